"""``LatentBridge``: from the latent space of one family to that of another, through pixels and with gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastvideo.distillation.bundle import Bridge, same_space
from fastvideo.errors import UserError


class PixelCodec(Protocol):
    """The part of a family's codec that a bridge needs."""

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


def bridge_between(source: PixelCodec, target: PixelCodec) -> Bridge:
    """A bridge from one latent space to another; the identity if ``latent_key`` is equal."""
    return same_space if source.latent_key == target.latent_key else LatentBridge(source, target)
