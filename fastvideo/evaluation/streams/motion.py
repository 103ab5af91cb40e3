"""Positions on the torus, and what a stream's frames show at any length: ink, saturation, windows for the judge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo.tiny.classifier import FRAMES

FAINT = 1e-3
"""Mean ink below which there is nothing whose position could be told."""


def light(videos: Tensor) -> Tensor:
    """Light of each pixel ``[..., 3, T, H, W]`` in [0, 1], of videos in ``[-1, 1]``."""
    return (videos.float().clamp(-1, 1) + 1) / 2


def ink(videos: Tensor) -> Tensor:
    """Mean light per frame: ``[N, T]`` of ``[N, 3, T, H, W]``."""
    return light(videos).mean(dim=(1, 3, 4))


def saturation(videos: Tensor) -> Tensor:
    """Chroma over the brightest channel, weighted by light, per frame ``[N, T]`` in [0, 1]; 0 for white and black.

    It does not depend on brightness.
    """
    x = light(videos)
    brightest = x.amax(1)
    chroma = (brightest - x.amin(1)).sum((-2, -1))
    return chroma / brightest.sum((-2, -1)).clamp_min(FAINT)


def centres(videos: Tensor) -> Tensor:
    """Position (x, y) of the ink on a torus in pixels, ``[N, T, 2]`` of ``[N, 3, T, S, S]``; NaN without ink.

    It is the phase of the first Fourier coefficient along each axis, exact to a fraction of a pixel and blind to an
    even background.
    """
    shade = light(videos).mean(1)
    size = shade.shape[-1]
    angles = (torch.arange(size, device=shade.device) + 0.5) * (2 * math.pi / size)
    wave = torch.polar(torch.ones_like(angles), angles)
    both = torch.stack([shade.sum(-2).to(wave.dtype) @ wave, shade.sum(-1).to(wave.dtype) @ wave], dim=-1)
    position = both.angle() % (2 * math.pi) * (size / (2 * math.pi))
    return position.where(both.abs() > FAINT * size**2, torch.nan)


def steps(positions: Tensor, size: int) -> Tensor:
    """Displacement between neighbouring frames ``[N, T - 1, 2]``, each the shortest way around the torus."""
    return wrapped(positions.diff(dim=1), size)


def wrapped(offsets: Tensor, size: int) -> Tensor:
    """Offsets in pixels as the shortest way around a torus, from ``-size / 2`` up to it."""
    return (offsets + size / 2) % size - size / 2


def centred(windows: Tensor, positions: Tensor) -> Tensor:
    """Windows rolled by whole pixels so that their middle frame is centred: legal videos of the nine-frame world.

    Args:
        windows: ``[N, 3, T, S, S]``.
        positions: of their frames ``[N, T, 2]``; a window without ink in the middle stays as it is.
    """
    size = windows.shape[-1]
    middle = positions[:, positions.shape[1] // 2].nan_to_num(size / 2)
    shift = (size / 2 - middle).round().long()
    places = torch.arange(size, device=windows.device)
    columns, rows = ((places - shift[:, axis, None]) % size for axis in (0, 1))
    moved = windows.gather(-1, columns[:, None, None, None, :].expand_as(windows))
    return moved.gather(-2, rows[:, None, None, :, None].expand_as(windows))


def window_starts(frames: int, stride: int) -> tuple[int, ...]:
    """First frames of the windows of the judge's length in a video, ``stride`` apart."""
    return tuple(range(0, frames - FRAMES + 1, stride))
