"""AnyFlow: a flow map for any number of steps, first from data, then on its own samples (arXiv 2605.13724).

``anyflow_pretrain``, the first stage, trains one network on data. ``anyflow``, the second, adds DMD2's gradient on
samples that the flow map makes by jumps of every length. Pitfalls: ``docs/methods/anyflow.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import Guidance, OptimizerConfig, OptimizerOptions, Shares
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.flow_map_loss import FlowMapLoss, FlowMapLossConfig
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.noise import add_noise, full_time, shift_time, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Steps


class AnyFlowPretrainConfig(FlowMapLossConfig, OptimizerOptions):
    """Options of the first stage."""

    learning_rate: LearningRate = 5e-5
    """AdamW learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW momenta."""
    warmup_steps: NonNegativeInt = 1000
    """Optimizer steps of linear warm-up."""


class AnyFlowPretrainMethod(DistillMethod[AnyFlowPretrainConfig]):
    """Student alone, trained on data."""

    Config = AnyFlowPretrainConfig
    trainable_roles = ("student",)
    sampler = "flow_map"
    summary = "AnyFlow stage 1: a flow map from data alone, guidance built in (arXiv 2605.13724)"

    def __init__(self, config: AnyFlowPretrainConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.flow_map_loss = FlowMapLoss(config, bundle["student"], rng)
        self.notes = (config.derivative_note,)

    @classmethod
    def optimizers(cls, config: AnyFlowPretrainConfig) -> Mapping[str, OptimizerConfig]:
        return {"student": config.optimizer_of(config.learning_rate)}

    @classmethod
    def needs_of(cls, config: AnyFlowPretrainConfig) -> frozenset[Need]:
        return config.derivative_needs | {"flow_map"}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        yield RoleLoss("student", self.flow_map_loss(batch))


class AnyFlowConfig(DMD2Config, FlowMapLossConfig):
    """Options of the second stage, besides those of DMD2 and of the flow-map loss."""

    rollout: Literal["simulate"] = "simulate"
    """Input of the student: its own jumps from noise."""
    rollout_steps: Annotated[tuple[Steps, ...], Field(min_length=1)] = (2, 4, 8, 16, 50)
    """Step counts; one is drawn, then one of its steps. The times before and after that step take one jump each."""
    flow_map_weight: NonNegativeFloat = 0.5
    """Weight of the flow-map loss beside DMD2's, whose mean has a factor of one half (published without: 1)."""
    teacher_guidance: Guidance = 4.0
    """Guidance of the teacher, standard convention (published as 3 in the extra one)."""
    generator_update_interval: PositiveInt = 1
    """Steps per update of the student; at 1 both are updated on every step."""
    score_time_shift: PositiveFloat = 5.0
    """Shift of the noise levels of both: uniform for the comparison, logit-normal for the critic."""
    score_and_train: Annotated[bool, refused("its critic learns at noise levels of another distribution")] = False
    """Not possible here."""
    critic_sees_rung: Annotated[bool, refused("its jumps are those of rollout_steps")] = False
    """Not possible here."""
    rung_shares: Annotated[Shares, refused("its jumps are those of rollout_steps", "empty")] = ()
    """Not possible here."""
    critic_learning_rate: LearningRate = 2e-6
    """AdamW learning rate of the critic."""


class AnyFlowMethod(DMD2Method):
    """Student (a flow map), frozen teacher, critic."""

    bridges = False
    Config = AnyFlowConfig
    config: AnyFlowConfig
    sampler = "flow_map"
    summary = "AnyFlow stage 2: distribution matching on jumps of every length (arXiv 2605.13724)"

    def __init__(self, config: AnyFlowConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.flow_map_loss = FlowMapLoss(config, bundle["student"], rng)
        self.notes = (*self.notes, config.derivative_note)

    @classmethod
    def needs_of(cls, config: AnyFlowConfig) -> frozenset[Need]:  # type: ignore[override]
        return config.derivative_needs | {"flow_map"}

    @classmethod
    def uses_latents(cls, config: AnyFlowConfig) -> bool:  # type: ignore[override]
        return config.flow_map_weight > 0

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """The flow-map loss on data (on student steps), then DMD2's losses on the student's sample."""
        if self.config.flow_map_weight and "student" in self.active_roles(step):
            loss = self.flow_map_loss(batch)
            yield RoleLoss("student", self.config.flow_map_weight * loss, {"flow_map_loss": loss.detach()})
        yield from super().losses(batch, step)

    def rollout(self, batch: Batch) -> Tensor:
        """Clean sample by up to three jumps with gradient: to a step of a drawn grid, over it, and to 0."""
        count = self.config.rollout_steps[self.rng.shared_index(len(self.config.rollout_steps))]
        start = self.rng.shared_index(count)
        grid = uniform_ladder(count, shift=self.config.score_time_shift).with_end
        x = self.rng.normal(batch.shape)
        stops = sorted({1.0, grid[start], grid[start + 1], 0.0}, reverse=True)
        for after, before in zip(stops[1:], stops, strict=False):
            x = self.student.flow_map(x, full_time(x, before), full_time(x, after), batch.condition)
        return x

    def critic_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Flow matching on the student's samples, at logit-normal times."""
        t = shift_time(self.rng.normal((len(batch),)).sigmoid(), self.config.score_time_shift)
        t, noise = t.clamp(*self.config.score_time_range), self.rng.normal_like(x0)
        u = self.critic.velocity(add_noise(x0, noise, t), t, batch.condition)
        return RoleLoss("critic", batch.mean((u - velocity_target(x0, noise)).square()))
