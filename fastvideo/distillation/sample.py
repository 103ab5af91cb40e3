"""Sampling loop of validation, generation, evaluation and trajectories."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.rng import normal, sample_seed, seeded
from fastvideo.distillation.rollout import SamplerKind, generate
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Condition

Visit = Callable[[int, Tensor], None]
"""Callback with a step's number and the state ``[B, C, F, H, W]`` before it."""


@dataclass(frozen=True)
class SamplerSpec:
    """Times, guidance (standard convention, 1 = conditional only) and kind of steps."""

    times: tuple[float, ...]
    guidance: float
    kind: SamplerKind

    @property
    def network_calls(self) -> int:
        """Forward passes per sample: guidance needs two per step."""
        return len(self.times) * (1 if self.guidance == 1.0 else 2)

    @classmethod
    def student(cls, ladder: Ladder, guidance: float = 1.0, kind: SamplerKind = "renoise") -> SamplerSpec:
        """Sampler of a student over its ladder."""
        return cls(ladder.times, guidance, kind)

    @classmethod
    def teacher(cls, times: tuple[float, ...], guidance: float) -> SamplerSpec:
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
        self._streams, self._device = [seeded(seed) for seed in seeds], torch.device(device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[len(seeds), *shape]``."""
        return torch.stack([normal(tuple(shape), stream) for stream in self._streams]).to(self._device)

    def like(self, x: Tensor) -> Tensor:
        """Next noise for a batch of latents."""
        return self.draw(x.shape[1:])


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
        noise: streams of the batch; the first draw is the starting point.
        shape: ``(C, F, H, W)`` of one sample.
        sampler: times, guidance and kind of steps.
        condition: of the batch.
        negative: for guidance other than 1.
        visit: called before each step.
        called: called after each step's network calls.
    """
    steps = itertools.count()

    def predict(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        if visit is not None:
            visit(next(steps), x_t)
        u = denoiser.guided_velocity(x_t, t, condition, negative or condition, sampler.guidance, r=r)
        if called is not None:
            called()
        return u

    return generate(sampler.kind, predict, noise.draw(shape), sampler.times, noise.like)
