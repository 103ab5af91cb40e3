"""Figures of single videos from their latents and pixels: motion, sharpness, saturation, flicker."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.evaluation.health import LUMINANCE

LOOKS = ("motion", "sharpness", "saturation", "flicker")


def motion(latents: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring latent frames ``[B]``; NaN for images. 0: a still.

    Latents have about unit variance, so that the figure means the same at every size and brightness.
    """
    return latents.float().diff(dim=2).abs().flatten(1).mean(1)


def looks(latents: Tensor, videos: Tensor) -> dict[str, Tensor]:
    """The figures :data:`LOOKS` of videos ``[B, 3, T, H, W]`` in ``[-1, 1]``, each ``[B]``; NaN where undefined.

    ``sharpness``: mean absolute Laplacian of the luminance. ``saturation``: mean span of the colour channels.
    ``flicker``: mean absolute second difference of the luminance in time, 0 for steady change.
    """
    x = (videos.float().clamp(-1, 1) + 1) / 2
    light = torch.einsum("bcthw,c->bthw", x, x.new_tensor(LUMINANCE))
    inner = light[..., 1:-1, 1:-1]
    around = light[..., :-2, 1:-1] + light[..., 2:, 1:-1] + light[..., 1:-1, :-2] + light[..., 1:-1, 2:]
    return {
        "motion": motion(latents).cpu(),
        "sharpness": (4 * inner - around).abs().flatten(1).mean(1),
        "saturation": (x.amax(1) - x.amin(1)).flatten(1).mean(1),
        "flicker": light.diff(n=2, dim=1).abs().flatten(1).mean(1),
    }
