"""Options of DMD2 and of the methods built on it."""

from __future__ import annotations

from typing import Literal

from pydantic import AfterValidator

from fastvideo.distillation.config.base import Guidance, MethodConfig, TimeRange
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def refused(reason: str) -> AfterValidator:
    """Validator that refuses a switch of DMD2 in a method that does not support it."""

    def check(value: bool) -> bool:
        if value:
            raise ValueError(f"must be false for this method: {reason}")
        return value

    return AfterValidator(check)


class DMD2Config(MethodConfig):
    """Options of DMD2."""

    rollout: Literal["simulate", "data"] = "simulate"
    """Input of the student: `simulate` runs the student itself from noise (prompts suffice), `data` noises real latents
    to a step of the ladder."""
    generator_update_interval: PositiveInt = 5
    """Steps per update of the student; the critic is updated on every step."""
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
