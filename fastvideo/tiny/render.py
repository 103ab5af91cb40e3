"""Rendering of the tiny world: a digit image under a random affine map, moving over a black frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MIN_SIDE, MAX_SIDE = 12.0, 17.0  # pixels that the 8x8 digit image covers
MAX_ROTATION = math.radians(12.0)
MAX_SHEAR = 0.12
EDGE = 1.05  # interpolation spreads ink beyond the image
MIN_SPEED, MAX_SPEED = 0.6, 1.4  # pixels per frame, along the direction of motion


@dataclass(frozen=True)
class Motion:
    """Affine maps and positions of n moving digits.

    Attributes:
        affine: [n, 2, 2] maps image-plane offsets (pixels) to offsets in the digit image (half sides).
        centres: [n, frames, 2] position of the centre in pixels (x to the right, y downwards).
    """

    affine: torch.Tensor
    centres: torch.Tensor

    @classmethod
    def draw(cls, u: torch.Tensor, unit: torch.Tensor, frames: int, size: int, wrap: bool = False) -> Motion:
        """Turn uniform numbers `u` [n, 6] and unit directions `unit` [n, 2] into motions.

        Args:
            wrap: move over a torus, without end; otherwise the digits stay inside the frame.
        """
        half = 0.5 * (MIN_SIDE + (MAX_SIDE - MIN_SIDE) * u[:, 0])
        angle = MAX_ROTATION * (2.0 * u[:, 1] - 1.0)
        shear = MAX_SHEAR * (2.0 * u[:, 2] - 1.0)
        cos, sin = angle.cos(), angle.sin()
        forward = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], dim=1).view(-1, 2, 2)
        forward = forward * half[:, None, None]
        # Half width and half height of the box around the digit image, with room for the fading edge of its ink.
        extent = forward.abs().sum(dim=2) * EDGE + 0.5
        centres = (
            torus_centres(u[:, 3:6], unit, frames, size) if wrap else _centres(u[:, 3:6], unit, extent, frames, size)
        )
        return cls(torch.linalg.inv(forward), centres)


def _centres(u: torch.Tensor, unit: torch.Tensor, extent: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """Centre per frame [n, frames, 2] for `u` [n, 3] (speed, start x, start y), `unit` [n, 2], `extent` [n, 2]."""
    room = (size - 2.0 * extent).clamp_min(0.0)
    # A big digit may not have room for the highest speed in its direction: lower the upper end, never the start.
    longest = (room / unit.abs().clamp_min(1e-6)).amin(dim=1) / (frames - 1)
    speed = MIN_SPEED + (longest.clamp(MIN_SPEED, MAX_SPEED) - MIN_SPEED) * u[:, 0]
    path = unit * (speed * (frames - 1))[:, None]
    low = extent - path.clamp_max(0.0)
    high = size - extent - path.clamp_min(0.0)
    start = low + (high - low).clamp_min(0.0) * u[:, 1:]
    time = torch.linspace(0.0, 1.0, frames)
    return start[:, None, :] + time[None, :, None] * path[:, None, :]


def torus_centres(u: torch.Tensor, unit: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """Centre per frame [n, frames, 2] of a digit that goes straight on, in pixels of the unrolled plane.

    A longer video begins with the frames of a shorter one.
    """
    speed = MIN_SPEED + (MAX_SPEED - MIN_SPEED) * u[:, 0]
    steps = torch.arange(frames, dtype=torch.float32)
    return size * u[:, None, 1:] + steps[None, :, None] * (speed[:, None] * unit)[:, None, :]


def render(
    images: torch.Tensor, rgb: torch.Tensor, motion: Motion, frames: int, size: int, wrap: bool = False
) -> torch.Tensor:
    """Draw videos.

    Args:
        images: [n, 8, 8] ink in [0, 1].
        rgb: [n, 3] colour in [0, 1].
        motion: affine maps and centres.
        wrap: draw the nearest image of the digit on a torus: what leaves on the left comes back on the right.

    Returns:
        float32 [n, 3, frames, size, size] in [-1, 1], black background.
    """
    n = len(images)
    pixel = torch.arange(size, dtype=torch.float32) + 0.5
    plane = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), dim=-1)  # [size, size, (x, y)]
    offset = plane - motion.centres[:, :, None, None, :]
    if wrap:
        offset = (offset + size / 2) % size - size / 2
    grid = torch.einsum("nij,nfhwj->nfhwi", motion.affine, offset)
    # One pixel of black around the image, so that ink at its edge fades out instead of ending in a step.
    padded = F.pad(images[:, None], (1, 1, 1, 1))
    grid = grid.reshape(n, frames * size, size, 2) * (8.0 / 10.0)
    ink = F.grid_sample(padded, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    ink = ink.view(n, 1, frames, size, size).clamp(0.0, 1.0)
    return (2.0 * ink * rgb[:, :, None, None, None] - 1.0).contiguous()
