"""KD: regression on the teacher's own trajectories (arXiv 2101.02388; the "ODE init" of arXiv 2412.07772).

The teacher's walks from noise to data are computed beforehand (``fastvideo precompute-trajectories``): its state at
every rung of the student's ladder, and the end. From any of these states the student regresses the end.

It is sampled deterministically, by Euler steps down the same ladder. ``docs/methods/kd.md`` says what that costs where
walks are curved, and what it wins on guided ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fastvideo.distillation.config.base import MethodConfig, OptimizerConfig
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.schedule import Guidance
from fastvideo.distillation.types import Batch, RoleLoss, Trajectory, UserError

TOLERANCE = 1e-6
"""How far the time of a stored state may be from the ladder's: what float32 rounds."""


class KDConfig(MethodConfig):
    """Options of knowledge distillation; those of the teacher say what the trajectories must have been made with."""

    teacher_path: str | None = None
    """Where the teacher's weights come from; the model's own path if not given."""
    teacher_guidance: Guidance = 6.0
    """Guidance of the teacher's walk, in the standard convention: it is baked into what the student learns."""
    teacher_steps: PositiveInt = 48
    """Euler steps of the teacher's walk, at the times of the family's own sampler; the ladder's are added to them."""
    learning_rate: PositiveFloat = 7e-5
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW momenta."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the cosine decay to zero after the warm-up; 0 keeps the rate constant."""


class KDMethod(DistillMethod[KDConfig]):
    """One role: the teacher is not in memory."""

    Config = KDConfig
    trainable_roles = ("student",)
    needs_latents = True
    needs_trajectories = True
    sampler = "euler"
    summary = "knowledge distillation, regression on the teacher's stored trajectories (arXiv 2101.02388)"

    @classmethod
    def optimizers(cls, config: KDConfig) -> Mapping[str, OptimizerConfig]:
        names = ("learning_rate", "betas", "weight_decay", "warmup_steps", "decay_steps")
        return {"student": OptimizerConfig.model_validate(config.model_dump(include=set(names)))}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """``1/2 mean (D(X_i, t_i) - X_end)^2`` at a rung ``i`` drawn for every sample."""
        walk = self.checked(batch)
        assert batch.x0 is not None
        rung = self.rng.index(len(batch), len(self.ladder))
        rows = torch.arange(len(batch), device=rung.device)
        t = torch.tensor(self.ladder.times, dtype=torch.float32, device=rung.device)[rung]
        x0 = self.bundle["student"].x0(walk.states[rows, rung], t, batch.condition)
        yield RoleLoss("student", 0.5 * batch.mean((x0 - batch.x0).square()))

    def checked(self, batch: Batch) -> Trajectory:
        """The batch's trajectories, whose states must lie on the ladder's own times: a near one is another noise level.

        Raises:
            UserError: if there are none, or they were made for another ladder.
        """
        walk, wanted = batch.trajectory, torch.tensor(self.ladder.times, dtype=torch.float32)
        if walk is None or batch.x0 is None:
            raise UserError("KD needs trajectories: data.path is a folder that fastvideo precompute-trajectories made")
        found = walk.times
        if found.shape[1:] != wanted.shape or not torch.allclose(
            found, wanted.expand_as(found), rtol=0, atol=TOLERANCE
        ):
            raise UserError(
                f"trajectories: the stored states are at times {found[0].tolist()}, the ladder has {wanted.tolist()}; "
                f"run fastvideo precompute-trajectories with this config"
            )
        return walk
