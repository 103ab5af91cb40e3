"""Options of Self-Forcing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import field_validator, model_validator

from fastvideo.distillation.config.base import Guidance, Shares, Time
from fastvideo.distillation.config.causal import CausalOptions
from fastvideo.distillation.methods.distribution_matching.dmd2_config import DMD2Config
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import UserError
from fastvideo.ranges import LearningRate, PositiveInt


class SelfForcingConfig(CausalOptions, DMD2Config):
    """Options of Self-Forcing, besides those of DMD2."""

    rollout: Literal["simulate"] = "simulate"
    """Input of the student: its own stream, from noise."""
    max_frames: PositiveInt | None = None
    """Latent frames of a rollout; those of the model's videos if not given."""
    min_frames: PositiveInt | None = None
    """Fewest latent frames of a rollout, whose length is then drawn between both, in steps of a chunk; if not given,
    every rollout has `max_frames`."""
    scored_frames: PositiveInt | None = None
    """Last latent frames of a rollout, which teacher and critic see and which carry gradient; as many as the model's
    videos have if not given."""
    first_frame: Literal["reencode", "mask", "keep"] = "reencode"
    """First latent of scored frames that begin inside a rollout, where teacher and critic know an image latent:
    `reencode` decodes and encodes its last video frame, and leaves it out of the losses; `mask` does only the latter;
    `keep` scores it as it is."""
    same_exit: bool = True
    """Draw one step of the ladder for the calls with gradient of all chunks, instead of one for each chunk."""
    last_exit_only: bool = False
    """Take the last step of the ladder always."""
    first_ladder: tuple[Time, ...] = ()
    """Noise levels of the first chunk, falling from 1, where it needs more steps than the ladder of the others has
    (Causal-Forcing++); empty for the same ones."""
    rung_shares: Annotated[Shares, refused("its chunks leave the ladder by same_exit and last_exit_only", "empty")] = ()
    """Not possible here."""
    teacher_guidance: Guidance = 4.0
    """Guidance of the teacher, standard convention (published as 3 in the extra one)."""
    critic_learning_rate: LearningRate = 4e-7
    """AdamW learning rate of the critic."""

    @model_validator(mode="after")
    def _lengths(self) -> SelfForcingConfig:
        if self.critic_sees_rung and (self.first_ladder or self.last_exit_only or not self.same_exit):
            raise ValueError(
                "critic_sees_rung needs samples of one step of the ladder, drawn for all chunks: same_exit: true, "
                "without last_exit_only and first_ladder"
            )
        least, most, chunk = self.min_frames, self.max_frames, self.reach.chunk
        if least is not None and (most is None or least > most or (most - least) % chunk):
            raise ValueError(f"min_frames: max_frames less a multiple of chunk {chunk}, got {least} and {most}")
        if most is not None and min(most, least or most) < chunk:
            raise ValueError(f"max_frames, min_frames: at least a chunk of {chunk}, got {most} and {least}")
        if self.scored_frames and most and self.scored_frames > most:
            raise ValueError(f"scored_frames: at most max_frames {most}, got {self.scored_frames}")
        return self

    @property
    def first_times(self) -> tuple[float, ...]:
        return self.first_ladder

    def longest(self, frames: int) -> int:
        """Latent frames of the longest rollout, for a model whose videos have ``frames``."""
        return self.max_frames or frames

    def check_frames(self, frames: int) -> None:
        super().check_frames(frames)
        scored = self.scored_frames or frames
        if scored > frames:
            raise UserError(
                f"method.scored_frames: the model's videos have {frames} latent frames (model.num_frames), and teacher "
                f"and critic see no more, got {scored}"
            )
        if scored == 1 < self.longest(frames) and self.first_frame != "keep":
            raise UserError(
                f"method.first_frame: {self.first_frame} leaves the first of 1 scored latent frame out, so that none "
                f"is left; raise model.num_frames or method.scored_frames, or set keep"
            )

    @field_validator("first_ladder")
    @classmethod
    def _from_noise(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if times and times[0] != 1.0:
            raise ValueError(f"a chunk starts from pure noise, 1.0, got {times[0]}")
        try:
            return times and Ladder(times).times
        except UserError as error:
            raise ValueError(str(error)) from error
