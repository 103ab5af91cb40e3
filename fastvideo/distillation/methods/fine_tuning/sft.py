"""SFT: flow-matching fine-tuning (Flow Matching arXiv 2210.02747; logit-normal times and shift from arXiv 2403.03206).

The smallest complete method, and the one that makes teachers. Read it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from fastvideo.distillation.methods.base import DistillMethod, MethodConfig, OptimizerConfig, TimeRange
from fastvideo.distillation.noise import add_noise, shift_time, velocity_target
from fastvideo.distillation.types import Batch, Condition, RoleLoss, UserError


class SFTConfig(MethodConfig):
    """Options of SFT."""

    time_density: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density of the training times before the shift; logit-normal has mean 0 and scale 1."""
    time_shift: PositiveFloat = 3.0
    """Shift of the training times: 3 for Wan at 480p, 5 at 720p."""
    time_range: TimeRange = (0.001, 0.999)
    """Times are clamped to this range, after the shift."""
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of samples whose caption is replaced by the negative one: without it guidance has nothing to push from."""
    learning_rate: PositiveFloat = 1e-5
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW momenta."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the cosine decay to zero after the warm-up; 0 keeps the rate constant."""


class SFTMethod(DistillMethod[SFTConfig]):
    """One role, trained on data."""

    Config = SFTConfig
    trainable_roles = ("student",)
    needs_latents = True
    sampler = "euler"
    summary = "flow-matching fine-tuning: makes and tunes teachers (arXiv 2210.02747)"

    @classmethod
    def optimizers(cls, config: SFTConfig) -> Mapping[str, OptimizerConfig]:
        names = ("learning_rate", "betas", "weight_decay", "warmup_steps", "decay_steps")
        return {"student": OptimizerConfig.model_validate(config.model_dump(include=set(names)))}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        if batch.x0 is None:
            raise UserError("SFT needs latents: give it a data source with videos, not prompts alone")
        noise, t = self.rng.normal_like(batch.x0), self.times(len(batch))
        x_t = add_noise(batch.x0, noise, t)
        u = self.bundle["student"].velocity(x_t, t, self.dropped(batch))
        yield RoleLoss("student", batch.mean((u - velocity_target(batch.x0, noise)).square()))

    def times(self, count: int) -> Tensor:
        """Training times ``[count]``, drawn as times and never as table indices (which would flip a skewed density)."""
        t = self.rng.uniform(count) if self.config.time_density == "uniform" else self.rng.normal((count,)).sigmoid()
        return shift_time(t, self.config.time_shift).clamp(*self.config.time_range)

    def dropped(self, batch: Batch) -> Condition:
        """The batch's condition with a share of rows replaced by the negative one."""
        keep = self.rng.uniform(len(batch)) >= self.config.caption_dropout
        return batch.condition.where(keep, batch.negative)
