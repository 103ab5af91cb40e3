"""Figures of single videos from their pixels: motion, sharpness, saturation, flicker."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.evaluation.alarms import FAINT
from fastvideo.evaluation.health import LUMINANCE

LOOKS = ("motion", "sharpness", "saturation", "flicker")


def looks(videos: Tensor) -> dict[str, Tensor]:
    """The figures :data:`LOOKS` of videos ``[B, 3, T, H, W]`` in ``[-1, 1]``, each ``[B]``; NaN where undefined.

    ``motion``: see :func:`speed`. ``sharpness``: mean absolute Laplacian of the luminance. ``saturation``: mean span of
    the colour channels. ``flicker``: mean absolute second difference of the luminance in time, 0 for steady change.
    """
    x = (videos.float().clamp(-1, 1) + 1) / 2
    light = torch.einsum("bcthw,c->bthw", x, x.new_tensor(LUMINANCE))
    inner = light[..., 1:-1, 1:-1]
    around = light[..., :-2, 1:-1] + light[..., 2:, 1:-1] + light[..., 1:-1, :-2] + light[..., 1:-1, 2:]
    return {
        "motion": speed(light),
        "sharpness": (4 * inner - around).abs().flatten(1).mean(1),
        "saturation": (x.amax(1) - x.amin(1)).flatten(1).mean(1),
        "flicker": light.diff(n=2, dim=1).abs().flatten(1).mean(1),
    }


def speed(light: Tensor) -> Tensor:
    """Speed of luminance ``[B, T, H, W]`` as normal flow, in pixels per frame: change in time over slope in space.

    So it depends neither on contrast nor on blur, as differences of latents or pixels do, and a still has 0. ``[B]``.
    """
    slope = light.diff(dim=-1).abs().flatten(1).mean(1) + light.diff(dim=-2).abs().flatten(1).mean(1)
    return light.diff(dim=1).abs().flatten(1).mean(1) / slope.clamp_min(FAINT / 10)
