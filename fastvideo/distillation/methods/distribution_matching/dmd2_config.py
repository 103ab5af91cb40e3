"""Options of DMD2, and of the methods that are built on it."""

from __future__ import annotations

from typing import Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fastvideo.distillation.config.base import MethodConfig, TimeRange
from fastvideo.distillation.schedule import Guidance


def refused(reason: str) -> AfterValidator:
    """Refuses a switch of DMD2 that a method built on it cannot have, and says why."""

    def check(value: bool) -> bool:
        if value:
            raise ValueError(f"must be false for this method: {reason}")
        return value

    return AfterValidator(check)


class DMD2Config(MethodConfig):
    """Options of DMD2."""

    rollout: Literal["simulate", "data"] = "simulate"
    """How the student's input is made: `simulate` runs the student itself from noise (prompts alone are enough);
    `data` noises real latents to a rung of the ladder."""
    generator_update_interval: PositiveInt = 5
    """The student is updated on every this-many-th step, the critic on every step."""
    teacher_guidance: Guidance = 4.5
    """Classifier-free guidance of the teacher in the standard convention: 1 is the conditional prediction. Another
    convention is converted by name: `{extra: 3.5}` is 4.5."""
    score_time_shift: PositiveFloat = 1.0
    """Shift of the uniform noise levels at which teacher and critic are compared and the critic is trained."""
    score_time_range: TimeRange = (0.02, 0.98)
    """Those noise levels are clamped to this range, after the shift."""
    score_and_train: bool = False
    """On a student step, take the critic's estimate for the student and its own loss from ONE forward, at one noise
    level: a call of the critic less. Its graph is then alive during the student's backward, and its loss there is at
    the noise level that the student was just compared at."""
    student_learning_rate: PositiveFloat = 2e-6
    """AdamW learning rate of the student."""
    critic_learning_rate: PositiveFloat = 8e-6
    """AdamW learning rate of the critic; it must follow the student, so it is usually the higher one."""
    betas: tuple[float, float] = (0.0, 0.999)
    """AdamW momenta of both."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay of both."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up, for both."""
