"""Rollouts chunk by chunk: each one from noise to clean latents on the past of those before it.

Training, sampling and live streams run these lines. A :class:`Streaming` is a network with role, condition and guidance
bound; its past is opaque here, as guidance needs two. Teacher forcing puts data in the place of the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from torch import Tensor

from fastvideo.distillation.chunks import Masked, Reach
from fastvideo.distillation.noise import add_noise, full_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Velocity

PastT = TypeVar("PastT")
Solve = Callable[[Velocity, Tensor], Tensor]
"""From the velocity and the noise of a chunk ``[B, C, c, H, W]`` to its clean latents, such as ``rollout.few_step``."""


class Streaming(Protocol[PastT]):
    """A network that continues a past."""

    def predict(self, past: PastT, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Velocity of the next chunk."""
        ...

    def commit(self, past: PastT, x0: Tensor) -> PastT:
        """The past after one more chunk, without gradient."""
        ...


def roll(stream: Streaming[PastT], past: PastT, noises: Iterable[Tensor], solve: Solve) -> Iterator[Tensor]:
    """Clean chunks, one after the other, with the graph that ``solve`` leaves.

    A chunk is committed when the next one is asked for, so the last one never is.
    """
    chunk: Tensor | None = None
    for noise in noises:
        if chunk is not None:
            past = stream.commit(past, chunk.detach())
        chunk = solve(bound(stream, past), noise)
        yield chunk


def bound(stream: Streaming[PastT], past: PastT) -> Velocity:
    """The velocity of the chunk behind a past."""

    def predict(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return stream.predict(past, x_t, t, r=r)

    return predict


def forced(reach: Reach, x0: Tensor, context_time: float, rng: RandomStreams) -> Masked:
    """Teacher forcing on ``x0`` ``[B, C, F, H, W]``, with noise at a time drawn uniformly up to ``context_time``."""
    if not context_time:
        return Masked(reach, x0)
    time = context_time * rng.shared_uniform()
    return Masked(reach, add_noise(x0, rng.normal_like(x0), full_time(x0, time)), time)
