"""``Parts``: one state of several tensors, such as a video and its sound, and the means over it.

Networks that make several things at once have one state per sample, flat ``[B, 1, 1, 1, N]``, so that noise, times and
samplers stay what they are. Its parts differ a hundredfold in size: whatever averages over the state goes through here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One tensor of a state: its name, the shape that it has in one sample, and its weight in means."""

    name: str
    shape: tuple[int, ...]
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Numbers of one sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parts:
    """Parts of a flat state, in their order."""

    members: tuple[Part, ...]

    def __str__(self) -> str:
        """``video and audio``."""
        return " and ".join(part.name for part in self.members)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape ``(1, 1, 1, N)`` of one sample's state."""
        return 1, 1, 1, sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Numbers of each part."""
        return [part.size for part in self.members]

    @property
    def shares(self) -> list[float]:
        """Weight of each part in a mean; together 1."""
        total = sum(part.weight for part in self.members)
        return [part.weight / total for part in self.members]

    def split(self, x: Tensor) -> list[Tensor]:
        """Each part ``[B, *shape]`` of a state."""
        flat = torch.split(x.flatten(1), self.sizes, dim=1)
        return [one.reshape(len(x), *part.shape) for one, part in zip(flat, self.members, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The state of its parts."""
        return torch.cat([one.flatten(1) for one in parts], dim=1)[:, None, None, None]

    def balanced(self, x: Tensor) -> Tensor:
        """``x``, scaled so that its plain mean is the weighted mean of the means of its parts."""
        total = sum(self.sizes)
        scales = [share * total / size for share, size in zip(self.shares, self.sizes, strict=True)]
        return x * torch.cat([x.new_full((size,), scale) for scale, size in zip(scales, self.sizes, strict=True)])

    def levels(self, x: Tensor) -> Tensor:
        """The mean of each part of a sample, at every number of the part, ``[B, 1, 1, 1, N]``."""
        means = [one.mean(dim=-1, keepdim=True) for one in torch.split(x, self.sizes, dim=-1)]
        return torch.cat([mean.expand(*x.shape[:-1], size) for mean, size in zip(means, self.sizes, strict=True)], -1)
