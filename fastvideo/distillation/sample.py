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

from fastvideo.distillation.causal_rollout import forced_velocity, next_chunk, switched
from fastvideo.distillation.chunks import Contexts, Masked, Past, Reach, frames_of, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.noise import GuidanceValue, add_noise, full_time
from fastvideo.distillation.rng import mixed, normal, seeded
from fastvideo.distillation.rollout import Ladder, SamplerKind, Velocity
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.types import Condition, UserError
from fastvideo.sampling_ranges import OnSwitch

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

    Raises:
        UserError: for a ``seed`` below 0, which callers in Python may give.
    """
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    before: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        words = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        seeds.append(mixed(seed, words, before[prompt]))
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
    stream = Stream(denoiser, noise, sampler, condition, negative, visit=visit, called=called)
    channels, frames, *size = shape
    pasts, last, chunks = stream.opened, None, []
    for count in stream.chunks(frames):
        pasts, last = stream.next_chunk(pasts, last, noise.draw((channels, count, *size)))
        chunks.append(last)
    return torch.cat(chunks, dim=2)


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


class Stream:
    """A denoiser with a sampler, noise and conditions of whole videos; arguments as for :func:`sample`.

    A network that sees all frames at once has one chunk, the video, and no past.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: SampleNoise,
        sampler: SamplerSpec,
        condition: Condition,
        negative: Condition | None = None,
        *,
        visit: Visit | None = None,
        called: Callable[[], None] | None = None,
    ) -> None:
        self.denoiser, self.condition, self.negative = denoiser, condition, negative or condition
        self.sampler, self._noise = sampler, noise
        self._visit, self._called, self._steps = visit, called, itertools.count()

    @property
    def opened(self) -> Contexts:
        """The empty pasts of both predictions."""
        reach = self.sampler.reach
        return (None, None) if reach is None else (Past(reach), Past(reach))

    def chunks(self, frames: int) -> list[int]:
        """Frames of each chunk of a video."""
        reach = self.sampler.reach
        return [frames] if reach is None else [end - start for start, end in spans(frames, reach.chunk)]

    def next_chunk(self, pasts: Contexts, last: Tensor | None, start: Tensor) -> tuple[Contexts, Tensor]:
        """Both pasts with the chunk ``last``, if there is one, and the clean chunk behind it, without gradient.

        ``start`` is its noise ``[B, C, c, H, W]``.
        """
        opening = last is None and not (isinstance(pasts[0], Past) and pasts[0].length)
        times = self.sampler.times_of(opening=opening)

        def solve(velocity: Velocity, start: Tensor) -> Tensor:
            return generate(self.sampler.kind, velocity, start, times, self._noise.like)

        return next_chunk(self, pasts, last, start, solve)

    def predict(self, past: Contexts, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Guided velocity of the next chunk."""
        if self._visit is not None:
            self._visit(next(self._steps), x_t)
        condition, negative = self._of_chunk(past, x_t)
        u = self.denoiser.guided_velocity(x_t, t, condition, negative, self.sampler.guidance, r=r, contexts=past)
        if self._called is not None:
            self._called()
        return u

    def commit(self, past: Contexts, x0: Tensor) -> Contexts:
        """Both pasts after a chunk; the unconditional one only if guidance reads it."""
        conditional, unconditional = past
        assert isinstance(conditional, Past)
        assert isinstance(unconditional, Past)
        condition, negative = self._of_chunk(past, x0)
        if time := self.sampler.context_time:
            x0 = add_noise(x0, self._noise.like(x0), full_time(x0, time))
        after = self.denoiser.commit(conditional, x0, condition, time)
        if self.sampler.guidance == 1.0:
            return after, after
        return after, self.denoiser.commit(unconditional, x0, negative, time)

    def switched(self, pasts: Contexts, condition: Condition, negative: Condition, policy: OnSwitch) -> Contexts:
        """Both pasts for chunks under another condition; what is seen without it stays if nothing is forgotten."""
        conditional, unconditional = pasts
        assert isinstance(conditional, Past)
        assert isinstance(unconditional, Past)
        after = switched(self.denoiser, conditional, condition, policy, t=self.sampler.context_time)
        if self.sampler.guidance == 1.0:
            return after, after
        return after, switched(self.denoiser, unconditional, negative, "keep" if policy == "recache" else policy)

    def _of_chunk(self, past: Contexts, x: Tensor) -> tuple[Condition, Condition]:
        if not isinstance(past[0], Past):
            return self.condition, self.negative
        start, end = past[0].length, past[0].length + x.shape[2]
        return frames_of(self.condition, start, end), frames_of(self.negative, start, end)


def guidance_text(guidance: GuidanceValue) -> str:
    """Guidance for people: ``4.5``, ``4 from 0.875 up, 3 below``."""
    if not isinstance(guidance, tuple):
        return f"{guidance:g}"
    parts = [f"{g:g} from {start:g} up" for start, g in guidance[:-1]]
    return f"{', '.join(parts)}, {guidance[-1][1]:g} below"
