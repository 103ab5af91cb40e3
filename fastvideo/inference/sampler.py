"""How a model is sampled, as a value, and the loop that does it; evaluation and ``fastvideo generate`` share both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.bundle import velocity_of
from fastvideo.distillation.noise import guide
from fastvideo.distillation.rng import normal, sample_seed, seeded
from fastvideo.distillation.rollout import SamplerKind, Velocity, generate
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Condition

BATCH_SIZE = 64
ProgressFn = Callable[[int], None]
"""Told the number of network calls just made, counted per sample."""


@dataclass(frozen=True)
class SamplerSpec:
    """Times, guidance (standard convention, 1 = conditional only) and the way from one time to the next."""

    times: tuple[float, ...]
    guidance: float
    kind: SamplerKind

    @property
    def network_calls(self) -> int:
        """Forward passes per sample: guidance needs two per step."""
        return len(self.times) * (1 if self.guidance == 1.0 else 2)

    @classmethod
    def student(cls, ladder: Ladder, guidance: float = 1.0, kind: SamplerKind = "renoise") -> SamplerSpec:
        """The sampler that a student was trained for, over its ladder."""
        return cls(ladder.times, guidance, kind)

    @classmethod
    def teacher(cls, times: tuple[float, ...], guidance: float) -> SamplerSpec:
        """Euler steps of the guided flow, at the times that the family's own scheduler walks."""
        return cls(times, guidance, "euler")


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents ``[B, C, F, H, W]`` on the CPU and the seconds that denoising them took, text encoding left out."""

    latents: Tensor
    seconds: float


class SampleNoise:
    """One random stream per sample, a pure function of (seed, index of the prompt): batching cannot change a result."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self._streams = [seeded(sample_seed(seed, index)) for index in indices]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[len(indices), *shape]``, drawn on the CPU so that every device gets the same."""
        return torch.stack([normal(tuple(shape), stream) for stream in self._streams]).to(self._device)

    def like(self, x: Tensor) -> Tensor:
        """The next noise for a batch of latents."""
        return self.draw(x.shape[1:])


def generate_batches(
    adapter: DistillAdapter[Any],
    network: nn.Module,
    prompts: Sequence[str],
    spec: SamplerSpec,
    *,
    seed: int,
    batch_size: int = BATCH_SIZE,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
    progress: ProgressFn | None = None,
) -> Iterator[LatentBatch]:
    """Sample the prompts in order, ``batch_size`` at a time.

    Args:
        seed: with a prompt's position in ``prompts`` it determines that prompt's noise.
        negative_prompt: what guidance leads away from; ``None`` is the adapter's own.
        frames: given first frames ``[len(prompts), 3, T, H, W]`` in ``[-1, 1]``, for a model that goes on from some.
        progress: called after every network call.

    Raises:
        UserError: for a prompt that the text encoder cannot take, or a number of frames that the model does not.
    """
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        first = adapter.conditioner.condition_on(None if frames is None else frames[rows.start : rows.stop])
        texts = [prompts[i] for i in rows]
        velocity = _velocity(adapter, network, texts, first, spec.guidance, negative_prompt, progress)
        begin = time.perf_counter()
        noise = SampleNoise(seed, rows, adapter.device)
        latents = generate(spec.kind, velocity, noise.draw(adapter.codec.latent_shape), spec.times, noise.like)
        latents = latents.float().cpu()  # waits for a GPU, so that the clock is right
        yield LatentBatch(latents, time.perf_counter() - begin)


def generate_latents(
    adapter: DistillAdapter[Any],
    network: nn.Module,
    prompts: Sequence[str],
    spec: SamplerSpec,
    *,
    seed: int,
    batch_size: int = BATCH_SIZE,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
    progress: ProgressFn | None = None,
) -> Tensor:
    """All of :func:`generate_batches` as one tensor ``[len(prompts), C, F, H, W]``, float32 on the CPU."""
    batches = generate_batches(
        adapter,
        network,
        prompts,
        spec,
        seed=seed,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        frames=frames,
        progress=progress,
    )
    return torch.cat([batch.latents for batch in batches])


def _velocity(
    adapter: DistillAdapter[Any],
    network: nn.Module,
    prompts: Sequence[str],
    first: Condition,
    guidance: float,
    negative_prompt: str | None,
    progress: ProgressFn | None,
) -> Velocity:
    """The guided velocity of one batch that goes on from ``first``, with text encoded beforehand."""
    condition = negative = adapter.conditioner.encode_prompts(prompts) | first
    if guidance != 1.0:
        text = adapter.conditioner.negative_prompt if negative_prompt is None else negative_prompt
        negative = adapter.conditioner.encode_prompts([text] * len(prompts)) | first
    calls = len(prompts) * (1 if guidance == 1.0 else 2)

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        u = velocity_of(adapter, network, x_t, t, condition, r=r)
        if guidance != 1.0:
            u = guide(velocity_of(adapter, network, x_t, t, negative, r=r), u, guidance)
        if progress is not None:
            progress(calls)
        return u

    return velocity
