"""CausVid: DMD2 on a causal student whose input is noised data, all chunks at once (arXiv 2412.07772).

Each chunk has a noise level of its own and sees the noisy chunks before it (diffusion forcing). Teacher and critic are
bidirectional. The student never meets its own samples as a past, so errors grow when it streams: ``self_forcing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastvideo.distillation.chunks import Masked, by_chunk
from fastvideo.distillation.config.base import Shares
from fastvideo.distillation.config.causal import CausalOptions
from fastvideo.distillation.methods.distribution_matching.chunk_metrics import means_by_chunk
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.methods.distribution_matching.dmd2_config import DMD2Config
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.types import Batch, Need
from fastvideo.ranges import Beta, Fraction, LearningRate


class CausVidConfig(CausalOptions, DMD2Config):
    """Options of CausVid, besides those of DMD2."""

    rollout: Literal["data"] = "data"
    """Input of the student: real latents, each chunk noised to a step of the ladder or left clean."""
    critic_sees_rung: Annotated[bool, refused("each chunk is at a step of its own, or clean")] = False
    """Not possible here."""
    rung_shares: Annotated[Shares, refused("each chunk is at a step of its own, or clean", "empty")] = ()
    """Not possible here."""
    context_time: Annotated[Fraction, refused("it trains on a noisy past, or a clean one", "0")] = 0.0
    """Not possible here."""
    critic_learning_rate: LearningRate = 2e-6
    """AdamW learning rate of the critic."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW momenta of both."""


class CausVidMethod(DMD2Method):
    """Causal student, frozen bidirectional teacher, bidirectional critic."""

    Config = CausVidConfig
    config: CausVidConfig
    bridges = False
    summary = "CausVid: DMD2 for a causal student on noised data (arXiv 2412.07772)"

    @classmethod
    def needs_of(cls, config: DMD2Config) -> frozenset[Need]:
        return super().needs_of(config) | {"frame_times"}

    def rollout(self, batch: Batch) -> Tensor:
        """Clean estimate of all chunks from one call; each chunk is at a drawn ladder time, or at 0."""
        reach, noise = self.config.reach, self.rng.normal(batch.shape)
        levels = torch.tensor(self.ladder.with_end, dtype=torch.float32, device=noise.device)
        t = by_chunk(lambda count: levels[self.rng.index(count, len(levels))], noise, reach.chunk)
        return self.student.x0(add_noise(batch.latents, noise, t), t, batch.condition, context=Masked(reach))

    def chunk_metrics(self, name: str, squares: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return means_by_chunk(name, squares, batch, self.config.reach.chunk)
