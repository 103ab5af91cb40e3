"""Frozen values that cross boundaries.

Shapes use diffusers' layout: latents are ``[B, C, F, H, W]``, an image is ``F = 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastvideo.errors import UserError

__all__ = [
    "STATES",
    "STATE_TIMES",
    "Batch",
    "Condition",
    "Given",
    "Need",
    "RawBatch",
    "RoleLoss",
    "Trajectory",
    "UserError",
    "free_means",
    "free_tokens",
]

STATES, STATE_TIMES = "trajectory", "trajectory_times"
"""Names of a teacher's walk among the extras of a :class:`RawBatch`."""
Need = Literal["flow_map", "jvp", "features", "frame_times"]
"""Abilities of a model family beyond its velocity: a second time ``r``, forward-mode derivatives of ``velocity``,
features inside the network, times per frame ``[B, F]``."""


@dataclass(frozen=True)
class Given:
    """Conditioning frames: latent frames that are given, not generated, such as the first frame of a continued image.

    ``mask`` is bool ``[B, F]``, true where a frame is given; ``clean`` are latents ``[B, C, F, H, W]`` that hold the
    given frames (what they hold elsewhere is never read).
    """

    mask: Tensor
    clean: Tensor

    @property
    def frames(self) -> Tensor:
        """The mask, shaped to broadcast against latents: ``[B, 1, F, 1, 1]``."""
        return self.mask[:, None, :, None, None]

    def fill(self, x: Tensor) -> Tensor:
        """``x`` ``[B, C, F, H, W]`` with the given frames in their place, to the bit and without gradient."""
        return self.clean.to(x.dtype).where(self.frames, x)

    def times(self, t: Tensor) -> Tensor:
        """Times ``[B]`` or ``[B, F]`` as ``[B, F]`` with 0, which is clean, on the given frames."""
        per_frame = t if t.ndim == 2 else t[:, None].expand(self.mask.shape)
        return per_frame.masked_fill(self.mask, 0.0)


def free_means(x: Tensor, given: Given | None) -> Tensor:
    """Mean of each sample of ``x`` ``[B, C, F, H, W]`` over what is not given: ``[B, 1, 1, 1, 1]``."""
    dims = tuple(range(1, x.ndim))
    if given is None:
        return x.mean(dim=dims, keepdim=True)
    free = x.masked_fill(given.frames, 0.0).sum(dim=dims, keepdim=True)
    return free / (~given.frames).expand(x.shape).sum(dim=dims, keepdim=True)


def free_tokens(count: int, given: Given) -> Tensor:
    """Bool ``[B, count]``: which of a sample's tokens, frame by frame, are of frames that are not given."""
    return ~given.mask.repeat_interleave(count // given.mask.shape[1], dim=1)


@dataclass(frozen=True)
class Condition:
    """Input of networks beside noise and time, for every family of a run.

    ``tensors`` hold batched tensors by conditioner (its ``key``) and name; the batch is their first dimension and only
    the conditioner's own family interprets them. ``given`` are conditioning frames, which every role sees clean: they
    travel with the condition so that no caller can forget them.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    given: Given | None = None

    def of(self, key: str) -> Mapping[str, Tensor]:
        """The tensors of one conditioner.

        Raises:
            RuntimeError: if the condition was not made by it.
        """
        if key not in self.tensors:
            raise RuntimeError(f"the condition holds no tensors of {key!r}, but of {', '.join(self.tensors) or 'none'}")
        return self.tensors[key]

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """``change`` applied to every tensor; conditioning frames stay."""
        changed = {
            key: {name: change(value) for name, value in tensors.items()} for key, tensors in self.tensors.items()
        }
        return Condition(changed, self.given)

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Rows of ``self`` where ``keep`` (bool ``[B]``) is true, of ``other`` elsewhere; conditioning frames stay."""

        def chosen(value: Tensor, fallback: Tensor) -> Tensor:
            return value.where(keep.view(-1, *[1] * (value.ndim - 1)), fallback)

        joined = {
            key: {name: chosen(value, other.of(key)[name]) for name, value in tensors.items()}
            for key, tensors in self.tensors.items()
        }
        return Condition(joined, self.given)

    def rows(self, index: slice) -> Condition:
        """Those rows of the batch."""
        given = None if self.given is None else Given(self.given.mask[index], self.given.clean[index])
        return Condition(self.map(lambda value: value[index]).tensors, given)

    def __or__(self, other: Condition) -> Condition:
        """Both conditions at once, such as a text and an image, or the texts of two families."""
        keys = dict.fromkeys((*self.tensors, *other.tensors))
        joined = {key: {**self.tensors.get(key, {}), **other.tensors.get(key, {})} for key in keys}
        return Condition(joined, other.given or self.given)


@dataclass(frozen=True)
class RawBatch:
    """One micro-batch of a data source: captions, and clean latents ``[B, C, F, H, W]`` (normalised) where it has them.

    ``extras`` is what else was computed beforehand and stands in for what the adapter would compute, batched, by name:
    ``text_embedding`` ``[B, L, D]``, and whatever more a family declares (``Conditioner.stored_shapes``).
    ``trajectory`` ``[B, K, C, F, H, W]`` and ``trajectory_times`` ``[B, K]`` are a teacher's states on the way there.
    """

    captions: tuple[str, ...]
    latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """A teacher's walks from noise to the data of a batch, at some of their times.

    ``states`` are ``[B, K, C, F, H, W]``, ``times`` float32 ``[B, K]``, on the CPU: the rectified-flow time of each.
    """

    states: Tensor
    times: Tensor

    @classmethod
    def of(cls, extras: Mapping[str, Tensor], device: torch.device) -> Trajectory | None:
        """Those among what a data source yields, on the device; ``None`` if there are none."""
        if STATES not in extras:
            return None
        return cls(extras[STATES].to(device, torch.float32, non_blocking=True), extras[STATE_TIMES].float())


@dataclass(frozen=True)
class Batch:
    """One prepared micro-batch.

    ``x0`` are normalised clean latents ``[B, C, F, H, W]`` in float32, or ``None`` for a text-only run; ``shape`` is
    their shape either way. ``negative`` is the condition of the unguided prediction; it holds the same given frames.
    """

    shape: tuple[int, ...]
    condition: Condition
    negative: Condition
    x0: Tensor | None = None
    trajectory: Trajectory | None = None
    """The teacher's states on the way to ``x0``; only for methods that train on them."""

    def __post_init__(self) -> None:
        if self.condition.given is not self.negative.given:
            raise ValueError("condition and negative condition of a batch hold the same given frames")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def given(self) -> Tensor | None:
        """Bool ``[B, F]``: frames that are given, not generated; ``None`` where there are none."""
        return None if self.condition.given is None else self.condition.given.mask

    @property
    def latents(self) -> Tensor:
        """``x0``, for an algorithm that cannot do without.

        Raises:
            UserError: for a batch of prompts alone.
        """
        if self.x0 is None:
            raise UserError(
                "the method trains on clean latents, and the data holds prompts alone: give data.path with "
                "preprocessed videos, or choose options of the method that need prompts alone"
            )
        return self.x0

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` ``[B, C, F, H, W]`` over what is generated: losses average with this, never with ``x.mean()``.

        Every sample weighs the same, however many of its frames are given.
        """
        return x.mean() if self.given is None else free_means(x, self.condition.given).mean()


@dataclass(frozen=True)
class RoleLoss:
    """A scalar loss that trains one role, with metrics that stay on the device until they are logged.

    ``frozen`` are roles whose parameters get no gradient from it.
    """

    role: str
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
