"""AnyFlow: a flow map for any number of steps, first from data, then on its own samples (arXiv 2605.13724).

``anyflow_pretrain`` is the first stage: one network on data. ``anyflow`` is the second: DMD2's gradient on samples that
the flow map makes by jumps of every length, beside the first stage's loss. Pitfalls and disagreements between
implementations: ``docs/methods/anyflow.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.dmd2_config import refused
from fastvideo.distillation.methods.distribution_matching.flow_map_loss import FlowMapLoss, FlowMapLossConfig
from fastvideo.distillation.noise import add_noise, shift_time, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.schedule import Guidance, Ladder
from fastvideo.distillation.types import Batch, Need, RoleLoss


def needs_of_flow_map(config: FlowMapLossConfig) -> frozenset[Need]:
    """A second time, and derivatives unless they are differences."""
    return frozenset({"flow_map", "jvp"} if config.jvp == "autodiff" else {"flow_map"})


class AnyFlowPretrainConfig(FlowMapLossConfig):
    """Options of the first stage."""

    learning_rate: PositiveFloat = 5e-5
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW momenta."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    warmup_steps: NonNegativeInt = 1000
    """Optimizer steps of linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Optimizer steps of the cosine decay to zero after the warm-up; 0 keeps the rate constant."""


class AnyFlowPretrainMethod(DistillMethod[AnyFlowPretrainConfig]):
    """One role, trained on data."""

    Config = AnyFlowPretrainConfig
    trainable_roles = ("student",)
    needs_latents = True
    needs = frozenset({"flow_map", "jvp"})
    sampler = "flow_map"
    summary = "AnyFlow stage 1: a flow map from data alone, guidance built in (arXiv 2605.13724)"

    def __init__(self, config: AnyFlowPretrainConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.flow_map_loss = FlowMapLoss(config, bundle["student"], rng)
        self.notes = (config.derivative_note,)

    @classmethod
    def optimizers(cls, config: AnyFlowPretrainConfig) -> Mapping[str, OptimizerConfig]:
        names = ("learning_rate", "betas", "weight_decay", "warmup_steps", "decay_steps")
        return {"student": OptimizerConfig.model_validate(config.model_dump(include=set(names)))}

    @classmethod
    def needs_of(cls, config: AnyFlowPretrainConfig) -> frozenset[Need]:
        return needs_of_flow_map(config)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        yield RoleLoss("student", self.flow_map_loss(batch))


class AnyFlowConfig(DMD2Config, FlowMapLossConfig):
    """Options of the second stage, on top of those of DMD2 and of the flow-map loss."""

    rollout: Literal["simulate"] = "simulate"
    """The student's samples come from its own jumps."""
    rollout_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 4, 8, 16, 50)
    """Numbers of steps of which one is drawn, then one of its steps; the jumps before and after it are one each."""
    flow_map_weight: NonNegativeFloat = 0.5
    """Weight of the flow-map loss beside DMD2's (whose mean has a half, which the published 1 to 1 has not)."""
    teacher_guidance: Guidance = 4.0
    """Guidance of the teacher, standard convention (published as 3 in the extra one)."""
    generator_update_interval: PositiveInt = 1
    """The student is updated on every this-many-th step, the critic on every step."""
    score_time_shift: PositiveFloat = 5.0
    """Shift of the noise levels of both: uniform for the comparison, logit-normal for the critic."""
    score_and_train: Annotated[bool, refused("its critic learns at noise levels of another distribution")] = False
    """Not possible here."""
    critic_learning_rate: PositiveFloat = 2e-6
    """AdamW learning rate of the critic."""


class AnyFlowMethod(DMD2Method):
    """Student (a flow map), frozen teacher, critic."""

    bridges = False
    Config = AnyFlowConfig
    config: AnyFlowConfig
    needs = frozenset({"flow_map", "jvp"})
    sampler = "flow_map"
    summary = "AnyFlow stage 2: distribution matching on jumps of every length (arXiv 2605.13724)"

    def __init__(self, config: AnyFlowConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.flow_map_loss = FlowMapLoss(config, bundle["student"], rng)
        self.notes = (*self.notes, config.derivative_note)

    @classmethod
    def needs_of(cls, config: AnyFlowConfig) -> frozenset[Need]:  # type: ignore[override]
        return needs_of_flow_map(config)

    @classmethod
    def uses_latents(cls, config: AnyFlowConfig) -> bool:  # type: ignore[override]
        return config.flow_map_weight > 0

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """On a student step the flow-map loss on data first, then DMD2's losses on the student's sample."""
        if self.config.flow_map_weight and "student" in self.active_roles(step):
            loss = self.flow_map_loss(batch)
            yield RoleLoss("student", self.config.flow_map_weight * loss, {"flow_map_loss": loss.detach()})
        yield from super().losses(batch, step)

    def rollout(self, batch: Batch) -> Tensor:
        """A clean sample by up to three jumps, all with gradient: to a step of a drawn grid, over it, and to 0."""
        count = self.config.rollout_steps[self.rng.shared_index(len(self.config.rollout_steps))]
        start = self.rng.shared_index(count)
        grid = Ladder.uniform(count, shift=self.config.score_time_shift).with_end
        x = self.rng.normal(batch.shape)
        stops = sorted({1.0, grid[start], grid[start + 1], 0.0}, reverse=True)
        for after, before in zip(stops[1:], stops, strict=False):
            t, r = (torch.full((len(batch),), time, dtype=torch.float32, device=x.device) for time in (before, after))
            x = self.student.flow_map(x, t, r, batch.condition)
        return x

    def critic_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Flow matching on the student's samples, at logit-normal times."""
        t = shift_time(self.rng.normal((len(batch),)).sigmoid(), self.config.score_time_shift)
        t, noise = t.clamp(*self.config.score_time_range), self.rng.normal_like(x0)
        u = self.critic.velocity(add_noise(x0, noise, t), t, batch.condition)
        return RoleLoss("critic", batch.mean((u - velocity_target(x0, noise)).square()))
