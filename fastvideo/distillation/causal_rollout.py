"""Rollouts chunk by chunk: each one from noise to clean latents on the past of those before it.

Training, sampling and live streams make every chunk by :func:`next_chunk`. A :class:`Streaming` is a network with role,
condition and guidance bound; its past is opaque here, as guidance needs two. Teacher forcing puts data in the place of
the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import Tensor

from fastvideo.distillation.chunks import Masked, Past, Reach, frames_of
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.noise import GuidanceValue, add_noise, full_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import NoiseLike, Velocity
from fastvideo.distillation.types import Condition
from fastvideo.sampling_ranges import OnSwitch

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


def next_chunk(
    stream: Streaming[PastT], past: PastT, last: Tensor | None, noise: Tensor, solve: Solve
) -> tuple[PastT, Tensor]:
    """The past with the chunk ``last``, if there is one, and the clean chunk behind it, with the graph of ``solve``.

    So a chunk is committed when the next one is asked for, and the last one of a video never is.
    """
    past = past if last is None else stream.commit(past, last)
    return past, solve(bound(stream, past), noise)


def roll(
    stream: Streaming[PastT], past: PastT, noises: Iterable[Tensor], solve: Solve
) -> Iterator[tuple[PastT, Tensor]]:
    """Clean chunks, one after the other, each with the past that it was made on."""
    last: Tensor | None = None
    for noise in noises:
        past, last = next_chunk(stream, past, last, noise, solve)
        yield past, last


@dataclass(frozen=True)
class Continuation:
    """A denoiser that continues a past, with the condition of its video bound.

    Attributes:
        denoiser: the network.
        condition: of the whole video.
        context_time: time of the noise on finished chunks, as the next ones see them; 0 keeps them clean.
        noise_like: that noise.
    """

    denoiser: Denoiser
    condition: Condition
    context_time: float
    noise_like: NoiseLike

    def predict(self, past: Past, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Velocity of the next chunk."""
        return self.denoiser.velocity(x_t, t, self._of_chunk(past, x_t), r=r, context=past)

    def commit(self, past: Past, x0: Tensor) -> Past:
        """The past after one more chunk, without gradient."""
        if self.context_time:
            x0 = add_noise(x0, self.noise_like(x0), full_time(x0, self.context_time))
        return self.denoiser.commit(past, x0, self._of_chunk(past, x0), self.context_time)

    def switched(self, past: Past, condition: Condition, policy: OnSwitch) -> tuple[Continuation, Past]:
        """The same with another condition, and the past for it."""
        after = switched(self.denoiser, past, condition, policy, t=self.context_time)
        return replace(self, condition=condition), after

    def _of_chunk(self, past: Past, x: Tensor) -> Condition:
        return frames_of(self.condition, past.length, past.length + x.shape[2])


def bound(stream: Streaming[PastT], past: PastT) -> Velocity:
    """The velocity of the chunk behind a past."""

    def predict(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return stream.predict(past, x_t, t, r=r)

    return predict


def forced(reach: Reach, x0: Tensor, context_time: float, rng: RandomStreams) -> Masked:
    """Teacher forcing on ``x0`` ``[B, C, F, H, W]``, with noise at a time drawn uniformly up to ``context_time``.

    Streams commit at ``context_time`` itself, the end of this range: they meet no time that the weights have not met.
    """
    if not context_time:
        return Masked(reach, x0)
    time = context_time * rng.shared_uniform()
    return Masked(reach, add_noise(x0, rng.normal_like(x0), full_time(x0, time)), time)


def switched(denoiser: Denoiser, past: Past, condition: Condition, policy: OnSwitch, *, t: float = 0.0) -> Past:
    """The past for chunks with another ``condition``; ``t`` is the time at which its chunks were committed."""
    if policy == "recache":
        return recache(denoiser, past, condition, t=t)
    if policy == "flush":
        sink = (piece for piece in past.pieces[:-1] if piece.start < past.reach.sink)
        return replace(past, pieces=(*sink, *past.pieces[-1:]))
    return Past(past.reach) if policy == "cut" else past


def recache(denoiser: Denoiser, past: Past, condition: Condition, *, t: float = 0.0) -> Past:
    """The past whose kept chunks, sink and window, were seen with ``condition``; without gradient."""
    anew = Past(past.reach)
    for piece in past.pieces:
        own = frames_of(condition, piece.start, piece.start + piece.frames)
        anew = denoiser.commit(replace(anew, length=piece.start), piece.latents, own, t)
    return anew


def forced_velocity(
    denoiser: Denoiser, past: Masked | None, condition: Condition, negative: Condition, guidance: GuidanceValue
) -> Velocity:
    """The guided velocity of a video at one time ``t`` ``[B]``: of the whole, or of chunks on their clean past."""

    def predict(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        times = t if past is None else t[:, None].expand(-1, x_t.shape[2])
        return denoiser.guided_velocity(x_t, times, condition, negative, guidance, r=r, contexts=(past, past))

    return predict
