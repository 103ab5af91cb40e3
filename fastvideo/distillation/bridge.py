"""``LatentBridge``: from the latent space of one family to that of another, through pixels and with gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastvideo.distillation.bundle import Bridge, same_space
from fastvideo.distillation.rng import normal, seeded
from fastvideo.errors import UserError

AGREEMENT = 0.01
"""Rms difference, of 1, up to which two codecs are taken to encode alike."""
CLIP = (3, 8, 8)
"""Most latent frames, height and width of the probe that two codecs of videos encode."""


class PixelCodec(Protocol):
    """The part of a family's codec that a bridge needs."""

    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int, int]: ...
    @property
    def latent_key(self) -> str: ...

    def encode(self, videos: Tensor, *, gradient: bool = False) -> Tensor: ...
    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor: ...


class LatentBridge:
    """Decodes with one codec and encodes with the other; their weights are frozen, so gradient reaches latents alone.

    Pixels are not clamped in between, so that saturated ones have a gradient too.

    Args:
        source: codec of the latents that come in.
        target: codec of those that go out.
    """

    def __init__(self, source: PixelCodec, target: PixelCodec) -> None:
        self.source, self.target = source, target

    def __call__(self, x0: Tensor) -> Tensor:
        """Clean latents of the target's space.

        Raises:
            UserError: if the two families do not make videos of one size.
        """
        bridged = self.target.encode(self.source.decode(x0, gradient=True), gradient=True)
        if tuple(bridged.shape[1:]) != self.target.latent_shape:
            raise UserError(
                f"the student's videos become latents {tuple(bridged.shape[1:])} (C, F, H, W) of the teacher's family, "
                f"which expects {self.target.latent_shape}: give both models one height, width and num_frames"
            )
        return bridged


def bridge_between(source: PixelCodec, target: PixelCodec, roles: Sequence[str]) -> tuple[Bridge, str]:
    """A bridge from one latent space to another, and a line about it.

    It is the identity if ``latent_key`` is equal, or if both encode alike: such as a VAE and its copy in bfloat16.

    Args:
        roles: for the line, those that live in the target's space.
    """
    names = " and ".join(roles)
    if source.latent_key == target.latent_key:
        return same_space, f"samples reach {names} as they are: the latent space is the student's"
    if source.latent_shape != target.latent_shape:
        why = f"latents are {target.latent_shape} there (C, F, H, W), the student's {source.latent_shape}"
        return LatentBridge(source, target), _through_pixels(names, why)
    found = clip_difference(source, target)
    why = f"latents of a clip differ by {found:.2%} rms, and up to {AGREEMENT:.0%} is taken for one space"
    if found <= AGREEMENT:
        return same_space, f"samples reach {names} as they are: {why}"
    return LatentBridge(source, target), _through_pixels(names, why)


def _through_pixels(names: str, why: str) -> str:
    return (
        f"samples reach {names} through pixels, whole videos that are decoded and encoded again with gradient, at the "
        f"time and memory of both VAEs: {why}"
    )


def clip_difference(source: PixelCodec, target: PixelCodec) -> float:
    """:func:`latent_difference` on a short clip, which the first codec decodes from noise."""
    channels, *sizes = source.latent_shape
    shape = (1, channels, *map(min, sizes, CLIP))
    return latent_difference(source, target, source.decode(normal(shape, seeded(0)).to(source.device)))


def latent_difference(source: PixelCodec, target: PixelCodec, videos: Tensor) -> float:
    """Rms difference of two codecs' latents of the same videos, as a share of the first's; NaN without weights."""
    one, other = source.encode(videos), target.encode(videos.to(target.device))
    if isinstance(one, FakeTensor) or isinstance(other, FakeTensor):
        return math.nan
    if one.shape != other.shape:
        return math.inf
    return float((one - other.to(one.device)).square().mean().sqrt() / one.square().mean().sqrt())
