"""Sampling loop of validation, generation, evaluation and trajectories."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.causal_rollout import OnSwitch, forced_velocity, roll, switched
from fastvideo.distillation.chunks import Contexts, Masked, Past, Reach, frames_of, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.noise import GuidanceValue, add_noise, full_time
from fastvideo.distillation.rng import normal, sample_seed, seeded
from fastvideo.distillation.rollout import NoiseLike, SamplerKind, Velocity, generate
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Condition

Visit = Callable[[int, Tensor], None]
"""Callback with a step's number and the state ``[B, C, F, H, W]`` before it."""


@dataclass(frozen=True)
class SamplerSpec:
    """Times, guidance (standard convention, 1 = conditional only) and kind of steps."""

    times: tuple[float, ...]
    guidance: GuidanceValue
    kind: SamplerKind
    reach: Reach | None = None
    """Frames that a chunk sees, for a network that generates chunk by chunk; ``None`` for whole videos at once."""
    context_time: float = 0.0
    """Time in [0, 1] of the noise on finished chunks, as the next ones see them."""
    first_times: tuple[float, ...] = ()
    """Times of the first chunk of a stream, where it takes others."""

    @property
    def network_calls(self) -> int:
        """Forward passes per sample, or per chunk without its commit: guidance needs two per step."""
        return len(self.times) * (1 if self.guidance == 1.0 else 2)

    def calls_of(self, frames: int) -> int:
        """Forward passes of a video of ``frames`` latent frames, without commits."""
        chunks = 1 if self.reach is None else len(spans(frames, self.reach.chunk))
        others = len(self.times_of(opening=True)) - len(self.times)
        return self.network_calls * chunks + others * (1 if self.guidance == 1.0 else 2)

    def times_of(self, *, opening: bool) -> tuple[float, ...]:
        """Times of a chunk, which is the first one of its video or not."""
        return self.first_times if opening and self.first_times else self.times

    @classmethod
    def student(cls, ladder: Ladder, guidance: GuidanceValue = 1.0, kind: SamplerKind = "renoise") -> SamplerSpec:
        """Sampler of a student over its ladder."""
        return cls(ladder.times, guidance, kind)

    @classmethod
    def teacher(cls, times: tuple[float, ...], guidance: GuidanceValue) -> SamplerSpec:
        """Euler steps of the guided flow, at the times of the family's own scheduler."""
        return cls(times, guidance, "euler")


def prompt_seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    """Noise seed of each prompt, from ``seed``, the prompt, and its earlier occurrences in ``prompts``.

    A sample therefore does not depend on batching, order or other prompts.
    """
    before: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        words = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        seeds.append(sample_seed(seed, words, before[prompt]))
        before[prompt] += 1
    return seeds


class SampleNoise:
    """Random stream per sample (one of ``seeds``), drawn on the CPU so that every device gets the same noise."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds, self._device = tuple(seeds), torch.device(device)
        self._streams = [seeded(seed) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[len(seeds), *shape]``."""
        return torch.stack([normal(tuple(shape), stream) for stream in self._streams]).to(self._device)

    def like(self, x: Tensor) -> Tensor:
        """Next noise for a batch of latents."""
        return self.draw(x.shape[1:])

    def fork(self) -> SampleNoise:
        """The same streams at the same positions, apart from these from now on."""
        other = copy.copy(self)
        other._streams = [stream.clone_state() for stream in self._streams]
        return other


def sample(
    denoiser: Denoiser,
    noise: SampleNoise,
    shape: Sequence[int],
    sampler: SamplerSpec,
    condition: Condition,
    negative: Condition | None = None,
    *,
    visit: Visit | None = None,
    called: Callable[[], None] | None = None,
) -> Tensor:
    """Clean latents ``[B, *shape]`` of one batch, without gradient.

    Args:
        denoiser: network to sample from.
        noise: streams of the batch. A chunk draws its starting point when it begins, so that a longer video of the same
            seed begins like a shorter one.
        shape: ``(C, F, H, W)`` of one sample.
        sampler: times, guidance and kind of steps.
        condition: of the batch.
        negative: for guidance other than 1.
        visit: called before each step.
        called: called after each step's network calls.
    """
    stream = streaming(denoiser, noise, sampler, condition, negative, visit=visit, called=called)
    channels, frames, *size = shape
    starts = (noise.draw((channels, count, *size)) for count in stream.chunks(frames))
    opening = itertools.chain([True], itertools.repeat(False))

    def solve(velocity: Velocity, start: Tensor) -> Tensor:
        return solved(sampler, noise, velocity, start, opening=next(opening))

    return torch.cat(list(roll(stream, stream.opened, starts, solve)), dim=2)


def streaming(
    denoiser: Denoiser,
    noise: SampleNoise,
    sampler: SamplerSpec,
    condition: Condition,
    negative: Condition | None = None,
    *,
    visit: Visit | None = None,
    called: Callable[[], None] | None = None,
) -> Stream:
    """The stream of a sampler; arguments as for :func:`sample`."""
    context = (sampler.context_time, noise.like) if sampler.context_time else None
    return Stream(denoiser, condition, negative or condition, sampler.guidance, sampler.reach, visit, called, context)


@torch.no_grad()
def sample_forced(
    denoiser: Denoiser,
    noise: SampleNoise,
    sampler: SamplerSpec,
    past: Masked,
    condition: Condition,
    negative: Condition,
    visit: Visit,
) -> Tensor:
    """Clean latents ``[B, C, F, H, W]`` of all chunks at once, each on the clean ones of ``past`` before it."""
    assert past.clean is not None
    velocity, steps = forced_velocity(denoiser, past, condition, negative, sampler.guidance), itertools.count()

    def predict(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        visit(next(steps), x_t)
        return velocity(x_t, t, r=r)

    return generate(sampler.kind, predict, noise.like(past.clean), sampler.times, noise.like)


def solved(sampler: SamplerSpec, noise: SampleNoise, velocity: Velocity, start: Tensor, *, opening: bool) -> Tensor:
    """Clean latents of the noise ``start`` ``[B, C, F, H, W]``, without gradient; ``opening``: nothing is before it."""
    return generate(sampler.kind, velocity, start, sampler.times_of(opening=opening), noise.like)


class Stream:
    """A denoiser with condition and guidance bound, for :func:`~fastvideo.distillation.causal_rollout.roll`.

    Args:
        denoiser, condition, negative, guidance: as for ``Denoiser.guided_velocity``, with conditions of whole videos.
        reach: ``None`` for a network that sees all frames at once: its only chunk is the video.
        visit, called: as for :func:`sample`.
        context: time in [0, 1] of the noise on finished chunks, and that noise; without it they stay clean.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        negative: Condition,
        guidance: GuidanceValue,
        reach: Reach | None,
        visit: Visit | None = None,
        called: Callable[[], None] | None = None,
        context: tuple[float, NoiseLike] | None = None,
    ) -> None:
        self.denoiser, self.condition, self.negative, self.guidance = denoiser, condition, negative, guidance
        self.reach, self._visit, self._called, self._steps = reach, visit, called, itertools.count()
        self._context = context

    @property
    def opened(self) -> Contexts:
        """The empty pasts of both predictions."""
        return (None, None) if self.reach is None else (Past(self.reach), Past(self.reach))

    def chunks(self, frames: int) -> list[int]:
        """Frames of each chunk of a video."""
        return [frames] if self.reach is None else [end - start for start, end in spans(frames, self.reach.chunk)]

    def predict(self, past: Contexts, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Guided velocity of the next chunk."""
        if self._visit is not None:
            self._visit(next(self._steps), x_t)
        condition, negative = self._of_chunk(past, x_t)
        u = self.denoiser.guided_velocity(x_t, t, condition, negative, self.guidance, r=r, contexts=past)
        if self._called is not None:
            self._called()
        return u

    def commit(self, past: Contexts, x0: Tensor) -> Contexts:
        """Both pasts after a chunk; the unconditional one only if guidance reads it."""
        conditional, unconditional = past
        assert isinstance(conditional, Past)
        assert isinstance(unconditional, Past)
        condition, negative = self._of_chunk(past, x0)
        time = 0.0
        if self._context is not None:
            time, noise_like = self._context
            x0 = add_noise(x0, noise_like(x0), full_time(x0, time))
        after = self.denoiser.commit(conditional, x0, condition, time)
        if self.guidance == 1.0:
            return after, after
        return after, self.denoiser.commit(unconditional, x0, negative, time)

    def switched(self, pasts: Contexts, condition: Condition, negative: Condition, policy: OnSwitch) -> Contexts:
        """Both pasts for chunks under another condition; what is seen without it stays if nothing is forgotten."""
        conditional, unconditional = pasts
        assert isinstance(conditional, Past)
        assert isinstance(unconditional, Past)
        time = 0.0 if self._context is None else self._context[0]
        after = switched(self.denoiser, conditional, condition, policy, t=time)
        if self.guidance == 1.0:
            return after, after
        return after, switched(self.denoiser, unconditional, negative, "keep" if policy == "recache" else policy)

    def _of_chunk(self, past: Contexts, x: Tensor) -> tuple[Condition, Condition]:
        if not isinstance(past[0], Past):
            return self.condition, self.negative
        start, end = past[0].length, past[0].length + x.shape[2]
        return frames_of(self.condition, start, end), frames_of(self.negative, start, end)
