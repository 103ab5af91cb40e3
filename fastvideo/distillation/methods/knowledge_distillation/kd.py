"""KD: regression on the teacher's own trajectories (arXiv 2101.02388; the "ODE init" of arXiv 2412.07772).

``fastvideo precompute-trajectories`` stores the teacher's state at every time of the student's ladder, and the end.
From any of these states the student regresses the end. Its sampler takes Euler steps down the same ladder;
``docs/methods/kd.md`` describes the effect on curved and on guided trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import sub
from typing import ClassVar

import torch

from fastvideo.distillation.config.base import OptimizerConfig, OptimizerOptions
from fastvideo.distillation.config.trajectories import TrajectoryOptions
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, RoleLoss, UserError
from fastvideo.ranges import LearningRate

TOLERANCE = 1e-6
"""Largest difference of a stored state's time from the ladder's: float32 rounding."""


class KDConfig(TrajectoryOptions, OptimizerOptions):
    """Options of knowledge distillation; stored trajectories must match those of the teacher."""

    learning_rate: LearningRate = 7e-5
    """AdamW learning rate."""


class KDMethod(DistillMethod[KDConfig]):
    """Student alone; the teacher is not in memory."""

    Config = KDConfig
    trainable_roles = ("student",)
    needs_trajectories = True
    sampler: ClassVar[SamplerKind] = "euler"
    summary = "knowledge distillation, regression on the teacher's stored trajectories (arXiv 2101.02388)"

    @classmethod
    def optimizers(cls, config: KDConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate)}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """``1/2 mean (D(X_i, t_i) - X_end)^2`` at a ladder step ``i`` drawn per sample."""
        trajectory = self.checked(batch, self.ladder.times)
        rung = self.rng.index(len(batch), len(self.ladder))
        rows = torch.arange(len(batch), device=rung.device)
        t = torch.tensor(self.ladder.times, dtype=torch.float32, device=rung.device)[rung]
        x0 = self.bundle["student"].x0(trajectory.states[rows, rung], t, batch.condition)
        yield RoleLoss("student", 0.5 * batch.mean((x0 - batch.latents).square()))

    def checked(self, batch: Batch, times: Sequence[float]) -> Trajectory:
        """Trajectories of the batch, with states exactly at ``times``.

        Raises:
            UserError: if there are none, or they were made for another ladder.
        """
        trajectory = batch.trajectory
        if trajectory is None or batch.x0 is None:
            raise UserError("KD needs trajectories: data.path is a folder that fastvideo precompute-trajectories made")
        found: list[list[float]] = trajectory.times.tolist()
        if any(len(row) != len(times) or max(map(abs, map(sub, row, times))) > TOLERANCE for row in found):
            raise UserError(
                f"trajectories: the stored states are at times {[round(t, 6) for t in found[0]]}, the ladder has "
                f"{list(times)}; run fastvideo precompute-trajectories with this config"
            )
        return trajectory
