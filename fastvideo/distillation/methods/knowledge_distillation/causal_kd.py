"""Causal KD: regression on an autoregressive teacher's trajectories, chunk by chunk, also as a start ("ODE init").

A trajectory's chunk was walked from noise to its end on clean chunks of data before it (Causal Forcing,
arXiv 2602.02214). From any state of the ladder, drawn per chunk, the student regresses that end on the same past. Pairs
of a bidirectional teacher (CausVid, arXiv 2412.07772) have ends that no past determines: the student learns their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastvideo.distillation.causal_rollout import forced
from fastvideo.distillation.chunks import Context, Masked, by_chunk
from fastvideo.distillation.config.causal import ForcingOptions
from fastvideo.distillation.methods.knowledge_distillation.kd import KDConfig, KDMethod
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.trajectory import TrajectoryKind
from fastvideo.distillation.types import Batch, RoleLoss
from fastvideo.ranges import LearningRate


class CausalKDConfig(ForcingOptions, KDConfig):
    """Options of causal knowledge distillation."""

    forcing: Literal["teacher", "diffusion"] = "teacher"
    """Past of a chunk: the clean data on which its trajectory was walked, or states of the chunks before it (CausVid),
    one of which may be the clean end."""
    allow_bidirectional_pairs: bool = False
    """Take trajectories of a teacher that makes whole videos at once, or whose folder does not say that it generates
    chunk by chunk; the ends of such are no function of a past."""
    learning_rate: LearningRate = 2e-6
    """AdamW learning rate."""

    @property
    def trajectory_kinds(self) -> tuple[TrajectoryKind, ...]:
        return ("causal", "bidirectional") if self.allow_bidirectional_pairs else ("causal",)

    @property
    def trusts_teachers(self) -> bool:
        return self.allow_bidirectional_pairs


class CausalKDMethod(KDMethod):
    """Student alone; the teacher is not in memory."""

    Config = CausalKDConfig
    config: CausalKDConfig
    sampler = "renoise"
    summary = "causal knowledge distillation on an autoregressive teacher's trajectories (arXiv 2602.02214)"

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """``1/2 mean (D(X_i, t_i) - X_end)^2`` over the frames with noise, at a ladder step ``i`` per chunk.

        Under diffusion forcing the end is one of the steps: a clean chunk to be seen, without a loss of its own.
        """
        walk, times = self.walk(batch), torch.tensor(self.ladder.with_end, dtype=torch.float32, device=self.rng.device)
        steps = len(times) if self.config.forcing == "diffusion" else len(times) - 1
        rung = by_chunk(partial(self.rng.index, high=steps), batch.latents, self.config.reach.chunk)
        t = times[rung]
        x0 = self.bundle["student"].x0(states_at(walk, rung), t, batch.condition, context=self.past(batch))
        noisy = (expand_time(t, x0) > 0).to(x0.dtype).expand_as(x0)
        error = batch.mean(noisy * (x0 - walk[:, -1]).square()) / batch.mean(noisy).clamp_min(1e-6)
        yield RoleLoss("student", 0.5 * error)

    def walk(self, batch: Batch) -> Tensor:
        """States ``[B, K + 1, C, F, H, W]`` at the ladder's times and at 0.

        Raises:
            UserError: if there are none, or they were made for another ladder.
        """
        stored = batch.trajectory
        bidirectional = stored is not None and stored.states.shape[1] == len(self.ladder)
        if bidirectional and self.config.allow_bidirectional_pairs:
            return torch.cat([self.checked(batch, self.ladder.times).states, batch.latents[:, None]], dim=1)
        return self.checked(batch, self.ladder.with_end).states

    def past(self, batch: Batch) -> Context:
        """The past of every chunk."""
        if self.config.forcing == "diffusion":
            return Masked(self.config.reach)
        return forced(self.config.reach, batch.latents, self.config.context_time, self.rng)


def states_at(walk: Tensor, rung: Tensor) -> Tensor:
    """Frames ``[B, C, F, H, W]`` of the states ``rung`` ``[B, F]`` of walks ``[B, K, C, F, H, W]``."""
    index = rung[:, None, None, :, None, None].expand(-1, 1, *walk.shape[2:])
    return walk.gather(1, index).squeeze(1)
