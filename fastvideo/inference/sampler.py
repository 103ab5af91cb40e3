"""Prompts to clean latents, batch by batch: :func:`fastvideo.distillation.sample.sample` with a family's conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, prompt_seeds, sample
from fastvideo.distillation.types import Condition
from fastvideo.inference.locks import lock_of

BATCH_SIZE = 64
ProgressFn = Callable[[int], None]
"""Called after each step with its network calls, counted per sample."""


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents ``[B, C, F, H, W]`` on the CPU, and the seconds of denoising, without text encoding."""

    latents: Tensor
    seconds: float


@dataclass(frozen=True)
class Sampling:
    """A set of prompts with a sampler.

    Attributes:
        seed: with the prompt it determines a sample's noise (:func:`prompt_seeds`).
        negative_prompt: guidance leads away from it; ``None`` is the family's own.
        frames: conditioning frames ``[len(prompts), 3, T, H, W]`` in ``[-1, 1]``, for a model that takes some.
        rows: numbers of the prompts to sample; all by default.
        latent_frames: of each sample, for a model that streams; the model's own by default.
    """

    prompts: Sequence[str]
    sampler: SamplerSpec
    seed: int
    batch_size: int = BATCH_SIZE
    negative_prompt: str | None = None
    frames: Tensor | None = None
    rows: Sequence[int] | None = None
    latent_frames: int | None = None

    def shape(self, family: DistillAdapter[Any]) -> tuple[int, int, int, int]:
        """Latent shape ``[C, F, H, W]`` of a sample."""
        channels, frames, height, width = family.codec.latent_shape
        return channels, self.latent_frames or frames, height, width

    @property
    def batches(self) -> list[Sequence[int]]:
        """Numbers of the prompts of each batch."""
        rows = range(len(self.prompts)) if self.rows is None else self.rows
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]


def sample_batches(
    family: DistillAdapter[Any], denoiser: Denoiser, wanted: Sampling, progress: ProgressFn | None = None
) -> Iterator[LatentBatch]:
    """Sample the prompts in order, ``batch_size`` at a time.

    Raises:
        UserError: for a prompt that the text encoder cannot take, or a wrong number of conditioning frames.
    """
    seeds = prompt_seeds(wanted.seed, wanted.prompts)
    for rows in wanted.batches:
        condition, negative = _conditions(family, wanted, rows)
        begin = time.perf_counter()
        noise = SampleNoise([seeds[row] for row in rows], family.device)
        called = None if progress is None else _counted(progress, len(rows), wanted.sampler)
        with lock_of(denoiser.network):
            latents = sample(denoiser, noise, wanted.shape(family), wanted.sampler, condition, negative, called=called)
        latents = latents.float().cpu()  # waits for a GPU, so that the clock is right
        yield LatentBatch(latents, time.perf_counter() - begin)


def sample_latents(
    family: DistillAdapter[Any], denoiser: Denoiser, wanted: Sampling, progress: ProgressFn | None = None
) -> Tensor:
    """All of :func:`sample_batches` as one tensor ``[N, C, F, H, W]``, float32 on the CPU."""
    return torch.cat([batch.latents for batch in sample_batches(family, denoiser, wanted, progress)])


def _conditions(family: DistillAdapter[Any], wanted: Sampling, rows: Sequence[int]) -> tuple[Condition, Condition]:
    """Condition and negative condition of one batch, with its conditioning frames."""
    first = of_frames(family.conditioner).condition_on(None if wanted.frames is None else wanted.frames[list(rows)])
    condition = family.conditioner.encode_prompts([wanted.prompts[row] for row in rows]) | first
    if wanted.sampler.guidance == 1.0:
        return condition, condition
    text = family.conditioner.negative_prompt if wanted.negative_prompt is None else wanted.negative_prompt
    return condition, family.conditioner.encode_prompts([text] * len(rows)) | first


def _counted(progress: ProgressFn, count: int, sampler: SamplerSpec) -> Callable[[], None]:
    calls = count * (1 if sampler.guidance == 1.0 else 2)
    return lambda: progress(calls)
