"""Layouts of latents ``[B, C, F, h, w]`` inside networks: everywhere else they keep that shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastvideo.distillation.types import UserError


class Packing(Protocol):
    """A layout, and its inverse."""

    def pack(self, x: Tensor) -> Tensor:
        """Latents ``[B, C, F, h, w]`` in this layout."""
        ...

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """Latents of the shape ``(B, C, F, h, w)``, bit for bit those that were packed."""
        ...

    def tokens(self, shape: Sequence[int]) -> int:
        """Tokens of a sample of the shape ``(C, F, h, w)``."""
        ...


@dataclass(frozen=True)
class Patches:
    """Tokens ``[B, F (h / side) (w / side), C side side]``, one per patch, frame by frame."""

    side: int = 2

    def pack(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        rows, columns = _patches(height, self.side), _patches(width, self.side)
        x = x.view(batch, channels, frames, rows, self.side, columns, self.side)
        return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames * rows * columns, channels * self.side**2)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        batch, channels, frames, height, width = shape
        patches = packed.view(
            batch, frames, height // self.side, width // self.side, channels, self.side, self.side
        ).permute(0, 4, 1, 2, 5, 3, 6)
        return patches.reshape(batch, channels, frames, height, width)

    def tokens(self, shape: Sequence[int]) -> int:
        _, frames, height, width = shape
        return frames * _patches(height, self.side) * _patches(width, self.side)


@dataclass(frozen=True)
class Pictures:
    """Pictures ``[B, C, h, w]``, of which the network makes patches by itself."""

    side: int = 2

    def pack(self, x: Tensor) -> Tensor:
        return x.squeeze(2)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed.unsqueeze(2)

    def tokens(self, shape: Sequence[int]) -> int:
        return Patches(self.side).tokens(shape)


def _patches(size: int, side: int) -> int:
    if size % side:
        raise UserError(f"latents of {size} pixels on a side do not divide into patches of {side}")
    return size // side
