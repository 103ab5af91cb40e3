"""Self-Forcing: DMD2 on videos that a causal student streams from its own past (arXiv 2506.08009).

The rollout of training is the sampler: chunk after chunk, each from noise over the ladder, on the committed chunks
before it. One call per chunk, at a drawn step of the ladder, has gradient, and no gradient flows through the past.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.causal_rollout import Continuation, Solve, roll
from fastvideo.distillation.chunks import Past, batch_of, spans
from fastvideo.distillation.methods.distribution_matching.chunk_metrics import means_by_chunk
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.methods.distribution_matching.self_forcing_config import (
    SelfForcingConfig as SelfForcingConfig,
)
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder, Velocity, few_step
from fastvideo.distillation.types import Batch

Times = tuple[float, ...]


class _Codec(Protocol):
    def encode(self, videos: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class _WithCodec(Protocol):
    @property
    def codec(self) -> _Codec: ...


class SelfForcingMethod(DMD2Method):
    """Causal student, frozen bidirectional teacher, bidirectional critic."""

    Config = SelfForcingConfig
    config: SelfForcingConfig
    bridges = False
    summary = "Self-Forcing: DMD2 on a causal student's own streams (arXiv 2506.08009)"

    def __init__(self, config: SelfForcingConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.first_times = Ladder(config.first_ladder).times if config.first_ladder else ladder.times

    def rollout(self, batch: Batch) -> Tensor:
        """Stream of the student, whose last scored frames have the gradient of one call per chunk."""
        frames = self.length(batch)
        noise = self.rng.normal((*batch.shape[:2], frames, *batch.shape[3:]))
        runs = spans(frames, self.config.reach.chunk)
        start = frames - self.window(batch, frames)
        plan = zip(self.exits(len(runs)), (end > start for _, end in runs), strict=True)
        chunks = torch.split(noise, [b - a for a, b in runs], dim=2)
        rolled = roll(self.stream(batch), Past(self.config.reach, shared={}), chunks, self.solver(plan))
        return torch.cat([chunk for _, chunk in rolled], dim=2)

    def stream(self, batch: Batch) -> Continuation:
        """The student with the batch's prompts."""
        return Continuation(self.student, batch.condition, self.config.context_time, self.rng.normal_like)

    def solver(self, plan: Iterator[tuple[Times, bool]]) -> Solve:
        """Few steps per chunk: the plan has the times of the next chunk's calls, and if it may carry gradient."""

        def solve(velocity: Velocity, noise: Tensor) -> Tensor:
            times, scored = next(plan)
            with torch.set_grad_enabled(scored and torch.is_grad_enabled()):
                return few_step(velocity, noise, times, self.rng.normal_like)

        return solve

    def exits(self, chunks: int, *, opening: bool = True) -> list[Times]:
        """Times of each chunk's calls, the last one with gradient; equal on all ranks, so that they run together.

        ``opening``: the first of them is the first one of a video.
        """
        first_times = self.first_times if opening else self.ladder.times
        ladders = [first_times, *[self.ladder.times] * (chunks - 1)]
        if self.config.last_exit_only:
            return ladders
        if not self.config.same_exit:
            return [times[: self.rng.shared_index(len(times)) + 1] for times in ladders]
        first, other = len(first_times), len(self.ladder)
        drawn = self.rng.shared_index(first)
        rest = drawn if first == other else self.rng.shared_index(other)
        self.rungs.latest = self.ladder.times[rest]
        return [first_times[: drawn + 1], *[self.ladder.times[: rest + 1]] * (chunks - 1)]

    def length(self, batch: Batch) -> int:
        """Latent frames of the next rollout, equal on all ranks."""
        most = self.config.longest(batch.shape[2])
        least, chunk = self.config.min_frames or most, self.config.reach.chunk
        return most if least == most else least + chunk * self.rng.shared_index((most - least) // chunk + 1)

    def window(self, batch: Batch, frames: int) -> int:
        """Scored latent frames of a rollout of ``frames``."""
        return min(self.config.scored_frames or batch.shape[2], frames)

    def sample(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Scored frames of a stream, and their batch."""
        x0 = self.rollout(batch)
        frames = x0.shape[2]
        start = frames - self.window(batch, frames)
        return self.scored(x0[:, :, start:], x0[:, :, : start + 1], batch_of(batch, start, frames), start)

    def scored(self, x0: Tensor, before: Tensor, batch: Batch, start: int, overlap: int = 0) -> tuple[Tensor, Batch]:
        """Frames from ``start`` on with the first one as an image latent, and the batch that scores them.

        ``before`` are clean latents up to the first one; the first ``overlap`` frames were scored already.
        """
        if start == 0 or self.config.first_frame == "keep":
            return x0, replace(batch, unscored=overlap)
        if self.config.first_frame == "reencode":
            x0 = torch.cat([self.image_latent(before), x0[:, :, 1:]], dim=2)
        return x0, replace(batch, unscored=max(overlap, 1))

    @torch.no_grad()
    def image_latent(self, latents: Tensor) -> Tensor:
        """The last video frame of ``latents`` as the latent ``[B, C, 1, H, W]`` of an image."""
        codec = cast(_WithCodec, self.student.adapter).codec
        return codec.encode(codec.decode(latents.detach())[:, :, -1:]).to(latents.dtype)

    def chunk_metrics(self, name: str, squares: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return means_by_chunk(name, squares, batch, self.config.reach.chunk)
