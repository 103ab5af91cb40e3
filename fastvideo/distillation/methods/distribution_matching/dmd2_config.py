"""Options of DMD2."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fastvideo.distillation.config.base import Guidance, MethodConfig, Shares, TimeRange
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class DMD2Config(MethodConfig):
    """Options of DMD2."""

    rollout: Literal["simulate", "data"] = "simulate"
    """`simulate` runs the student from noise (prompts suffice), `data` noises real latents to a step of the ladder."""
    generator_update_interval: PositiveInt = 5
    """Steps per update of the student; the others update what learns from its samples."""
    critic_updates_on_student_steps: bool = True
    """Update the critic (and a discriminator) on the student's steps too, on the same sample: an interval of 5 is 1
    student and 5 critic updates. Without, student steps are cheaper: 1 and 4, as in FastGen."""
    rung_shares: Shares = ()
    """Share of the rollouts that end at each step of the ladder, the noisiest first; empty means equal shares."""
    critic_sees_rung: bool = False
    """Tell the critic at which step of the ladder a sample was made, by a second time that its network learns to read.
    One critic of all steps matches their mixture to the teacher: faint and bold ones make up for each other."""
    teacher_guidance: Guidance = 4.5
    """Classifier-free guidance of the teacher in the standard convention, where 1 is the conditional prediction; others
    are converted by name: `{extra: 3.5}` is 4.5."""
    score_time_shift: PositiveFloat = 1.0
    """Shift of the uniform noise levels at which teacher and critic are compared and the critic is trained."""
    score_time_range: TimeRange = (0.02, 0.98)
    """Range to which those noise levels are clamped after the shift."""
    score_and_train: bool = False
    """On a student step, take the critic's estimate for the student and the critic's own loss from one forward at one
    noise level. It saves a call of the critic and keeps the critic's graph alive during the student's backward."""
    student_learning_rate: LearningRate = 2e-6
    """AdamW learning rate of the student."""
    critic_learning_rate: LearningRate = 8e-6
    """AdamW learning rate of the critic; usually the higher one, because the critic must follow the student."""
    betas: tuple[Beta, Beta] = (0.0, 0.999)
    """AdamW momenta of both."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay of both."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up, for both."""

    @property
    def flow_maps(self) -> tuple[str, ...]:
        return ("critic",) if self.critic_sees_rung else ()

    @model_validator(mode="after")
    def _critic_trains(self) -> DMD2Config:
        if self.critic_updates_on_student_steps:
            return self
        if self.generator_update_interval == 1:
            raise ValueError(
                "generator_update_interval: 1 never trains the critic without critic_updates_on_student_steps"
            )
        if self.score_and_train:
            raise ValueError("score_and_train is one forward for both losses: it needs critic_updates_on_student_steps")
        return self
