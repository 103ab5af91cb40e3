"""Figures of single videos from their pixels: motion, sharpness, saturation, flicker."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.evaluation.health import LUMINANCE

ROWS, WINDOW = 64, 9
"""Rows to which a video is reduced for its speed, and the side of a window there, in pixels."""
RIDGE, TINY = 0.01, 1e-8
"""Share of the slope, and least slope, that keep a window without texture still."""
LOOKS = ("motion", "sharpness", "saturation", "flicker")
LEAST_FRAMES = {"motion": 2, "flicker": 3}
"""Frames that figures of change over time compare; shorter videos, stills among them, do not have them."""


def looks(videos: Tensor) -> dict[str, Tensor]:
    """The figures :data:`LOOKS` of videos ``[B, 3, T, H, W]`` in ``[-1, 1]``, as far as they have them, each ``[B]``.

    ``motion``: see :func:`speed`. ``sharpness``: mean absolute Laplacian of the luminance. ``saturation``: mean span of
    the colour channels. ``flicker``: mean absolute second difference of the luminance in time, 0 for steady change.
    """
    x = (videos.float().clamp(-1, 1) + 1) / 2
    light = torch.einsum("bcthw,c->bthw", x, x.new_tensor(LUMINANCE))
    inner = light[..., 1:-1, 1:-1]
    around = light[..., :-2, 1:-1] + light[..., 2:, 1:-1] + light[..., 1:-1, :-2] + light[..., 1:-1, 2:]
    found = {
        "sharpness": (4 * inner - around).abs().flatten(1).mean(1),
        "saturation": (x.amax(1) - x.amin(1)).flatten(1).mean(1),
    }
    if light.shape[1] >= LEAST_FRAMES["motion"]:
        found["motion"] = speed(light)
    if light.shape[1] >= LEAST_FRAMES["flicker"]:
        found["flicker"] = light.diff(n=2, dim=1).abs().flatten(1).mean(1)
    return found


def speed(light: Tensor) -> Tensor:
    """Speed of luminance ``[B, T, H, W]``: optical flow that is fitted in windows (Lucas and Kanade 1981), ``[B]``.

    In pixels per frame of videos reduced to about :data:`ROWS` rows, averaged over windows by their slope. It depends
    neither on contrast nor on blur, as differences of latents or pixels do, and a still has 0.
    """
    light = F.avg_pool2d(light, max(1, light.shape[-2] // ROWS))
    between, change = (light[:, 1:] + light[:, :-1]) / 2, light.diff(dim=1)[..., 1:-1, 1:-1]
    across = (between[..., 1:-1, 2:] - between[..., 1:-1, :-2]) / 2
    down = (between[..., 2:, 1:-1] - between[..., :-2, 1:-1]) / 2
    size = min(WINDOW, *change.shape[-2:])

    def windows(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, size, max(1, size // 2))

    xx, yy, xy = windows(across.square()), windows(down.square()), windows(across * down)
    xt, yt, slope = windows(across * change), windows(down * change), xx + yy
    xx, yy = xx + RIDGE * slope + TINY, yy + RIDGE * slope + TINY
    flow = torch.stack([yy * xt - xy * yt, xx * yt - xy * xt]) / (xx * yy - xy.square())
    moved = (slope * flow.square().sum(0).sqrt()).flatten(1).sum(1)
    return moved / slope.flatten(1).sum(1).clamp_min(TINY)
