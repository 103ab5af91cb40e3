"""The values that cross boundaries: frozen and free of behaviour beyond indexing.

Shapes use diffusers' layout: latents are ``[B, C, F, H, W]``, an image is ``F = 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastvideo.errors import UserError

__all__ = ["Batch", "Condition", "RawBatch", "RoleLoss", "UserError"]


@dataclass(frozen=True)
class Condition:
    """What a network is conditioned on, as batched tensors that only the adapter interprets.

    Every tensor has the batch as its first dimension.
    """

    tensors: Mapping[str, Tensor]

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Rows of ``self`` where ``keep`` (bool ``[B]``) is true, rows of ``other`` elsewhere."""
        return Condition(
            {
                key: value.where(keep.view(-1, *[1] * (value.ndim - 1)), other.tensors[key])
                for key, value in self.tensors.items()
            }
        )

    def rows(self, index: slice) -> Condition:
        """The given rows of the batch."""
        return Condition({key: value[index] for key, value in self.tensors.items()})


@dataclass(frozen=True)
class RawBatch:
    """What a data source yields: captions, and clean latents ``[B, C, F, H, W]`` (normalised) where it has them.

    ``extras`` is what else was computed beforehand and stands in for what the adapter would compute, batched, by name:
    ``text_embedding`` ``[B, L, D]``, and whatever more a family declares (``DistillAdapter.extra_shapes``).
    """

    captions: tuple[str, ...]
    latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One prepared micro-batch.

    ``x0`` are normalised clean latents ``[B, C, F, H, W]`` in float32, or ``None`` for a text-only run; ``shape`` is
    their shape either way. ``negative`` is the condition of the unguided prediction.
    """

    shape: tuple[int, ...]
    condition: Condition
    negative: Condition
    x0: Tensor | None = None

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class RoleLoss:
    """A scalar loss that trains one role, with metrics that stay on the device until they are logged."""

    role: str
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
