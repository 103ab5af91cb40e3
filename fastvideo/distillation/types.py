"""Frozen values that cross boundaries.

Shapes use diffusers' layout: latents are ``[B, C, F, H, W]``, an image is ``F = 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from fastvideo.errors import UserError as UserError

if TYPE_CHECKING:
    from fastvideo.distillation.parts import Parts
    from fastvideo.distillation.trajectory import Trajectory

Need = Literal["flow_map", "jvp", "features", "frame_times", "chunks", "frames"]
"""Abilities of a model family beyond its velocity: a second time ``r``, forward-mode derivatives of ``velocity``,
features inside the network, times per frame ``[B, F]``, causal calls on a past, samples that are frames alone."""


@dataclass(frozen=True)
class FrameMask:
    """Some latent frames of each sample: ``mask`` is bool ``[B, F]``, true on them."""

    mask: Tensor

    @property
    def frames(self) -> Tensor:
        """The mask as ``[B, 1, F, 1, 1]``, which broadcasts against latents."""
        return self.mask[:, None, :, None, None]


@dataclass(frozen=True)
class Given(FrameMask):
    """Conditioning frames: latent frames that are not generated, such as the first one of a continued image.

    ``mask`` is true on conditioning frames; ``clean`` are latents ``[B, C, F, H, W]``, valid there.
    """

    clean: Tensor

    def fill(self, x: Tensor) -> Tensor:
        """``x`` ``[B, C, F, H, W]`` with the clean conditioning frames put in, bit-exact and without gradient."""
        return self.clean.to(x.dtype).where(self.frames, x)

    def times(self, t: Tensor) -> Tensor:
        """Times ``[B]`` or ``[B, F]`` as ``[B, F]`` with 0 (clean) on conditioning frames."""
        per_frame = t if t.ndim == 2 else t[:, None].expand(self.mask.shape)
        return per_frame.masked_fill(self.mask, 0.0)


Scored: TypeAlias = "FrameMask | Parts"
"""What means over a sample leave out, or the parts that they weigh; means over all of it need none."""


def mean_over_generated(x: Tensor, given: Scored | None) -> Tensor:
    """Mean ``[B, 1, 1, 1, 1]`` of each sample of ``x`` ``[B, C, F, H, W]`` over its frames but the ``given`` ones."""
    dims = tuple(range(1, x.ndim))
    if given is None:
        return x.mean(dim=dims, keepdim=True)
    if not isinstance(given, FrameMask):
        return given.balanced(x).mean(dim=dims, keepdim=True)
    free = x.masked_fill(given.frames, 0.0).sum(dim=dims, keepdim=True)
    return free / (~given.frames).expand(x.shape).sum(dim=dims, keepdim=True)


def level(x: Tensor, given: Scored | None) -> Tensor:
    """:func:`mean_over_generated` to divide by: each part of a state by its own."""
    return mean_over_generated(x, given) if given is None or isinstance(given, FrameMask) else given.levels(x)


@dataclass(frozen=True)
class Condition:
    """Input of networks beside noise and time, for every family of a run.

    ``tensors`` are batched tensors by conditioner key and name; only that conditioner's family interprets them.
    ``given`` are conditioning frames, which every role sees clean; they travel here so that no caller forgets them.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    given: Given | None = None

    def of(self, key: str) -> Mapping[str, Tensor]:
        """Tensors of one conditioner; RuntimeError if it did not contribute."""
        if key not in self.tensors:
            raise RuntimeError(f"the condition holds no tensors of {key!r}, but of {', '.join(self.tensors) or 'none'}")
        return self.tensors[key]

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """``change`` applied to every tensor; conditioning frames stay."""
        changed = {
            key: {name: change(value) for name, value in tensors.items()} for key, tensors in self.tensors.items()
        }
        return Condition(changed, self.given)

    def rows(self, index: slice) -> Condition:
        """Part of the batch."""
        given = None if self.given is None else Given(self.given.mask[index], self.given.clean[index])
        return Condition(self.map(lambda value: value[index]).tensors, given)

    def __or__(self, other: Condition) -> Condition:
        """Union, such as of a text and an image, or of the texts of two families."""
        keys = dict.fromkeys((*self.tensors, *other.tensors))
        joined = {key: {**self.tensors.get(key, {}), **other.tensors.get(key, {})} for key in keys}
        return Condition(joined, other.given or self.given)


@dataclass(frozen=True)
class RawBatch:
    """One micro-batch of a data source: captions, and normalised clean latents ``[B, C, F, H, W]`` if it has them.

    ``extras`` are precomputed tensors by name, batched: ``text_embedding`` ``[B, L, D]``, those that a family declares
    (``Conditioner.stored_shapes``), and a teacher's ``trajectory`` with its ``trajectory_times``. ``switches`` are
    prompts to which a stream of each sample may switch.
    """

    captions: tuple[str, ...]
    latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    switches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One prepared micro-batch.

    ``x0`` are normalised clean latents, float32, or ``None`` in a text-only run; ``shape`` is theirs.
    ``negative`` is the condition of the unconditional prediction and holds the same conditioning frames.
    The first ``unscored`` frames are seen by networks as all others, and left out by losses. ``switch`` is the
    condition of the prompts that follow, in a stream that switches. ``parts`` are those of a flat state.
    """

    shape: tuple[int, ...]
    condition: Condition
    negative: Condition
    x0: Tensor | None = None
    trajectory: Trajectory | None = None
    unscored: int = 0
    switch: Condition | None = None
    parts: Parts | None = None

    def __post_init__(self) -> None:
        if self.condition.given is not self.negative.given:
            raise ValueError("condition and negative condition of a batch must hold the same conditioning frames")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def latents(self) -> Tensor:
        """``x0``; UserError for a batch of prompts alone."""
        if self.x0 is None:
            raise UserError(
                "the method trains on clean latents, and the data holds prompts alone: give data.path with "
                "preprocessed videos, or choose options of the method that need prompts alone"
            )
        return self.x0

    def left_out(self, x: Tensor) -> Scored | None:
        """Frames of ``x`` ``[B, C, F, H, W]`` that losses leave out: conditioning frames and ``unscored`` ones; or the
        parts that they weigh, of a state that has no frames."""
        if self.parts is not None:
            return self.parts
        given = self.condition.given
        if not self.unscored:
            return given
        first = torch.arange(x.shape[2], device=x.device).expand(len(x), -1) < self.unscored
        return FrameMask(first if given is None else first | given.mask)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` ``[B, C, F, H, W]`` without :meth:`left_out`, samples alike; losses average with it."""
        if self.parts is not None:
            return self.parts.balanced(x).mean()
        left_out = self.left_out(x)
        return x.mean() if left_out is None else mean_over_generated(x, left_out).mean()


@dataclass(frozen=True)
class RoleLoss:
    """Scalar loss of one role, with metrics that stay on the device until logged; ``frozen`` roles get no gradient."""

    role: str
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
