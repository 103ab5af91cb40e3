"""Options of streaming tuning."""

from __future__ import annotations

from pydantic import model_validator

from fastvideo.distillation.chunks import spans
from fastvideo.distillation.methods.distribution_matching.self_forcing_config import SelfForcingConfig
from fastvideo.distillation.types import UserError
from fastvideo.ranges import LearningRate, PositiveInt
from fastvideo.sampling_ranges import OnSwitch

STREAM = 2
"""Frames of a stream in those of the model's videos, where the config names none."""


class StreamingTuningConfig(SelfForcingConfig):
    """Options of streaming tuning, besides those of Self-Forcing."""

    max_frames: PositiveInt | None = None
    """Latent frames after which a stream ends and another begins; twice those of the model's videos if not given."""
    min_frames: PositiveInt | None = None
    """Latent frames of the shortest stream, whose length is then drawn between both, in steps of a chunk; if not given,
    every stream has `max_frames`."""
    min_new_frames: PositiveInt | None = None
    """Fewest latent frames by which a step continues a stream, drawn up to `scored_frames`; all of these but one chunk
    if not given. A step ends where the prompt switches, and the last one behind a switch may have fewer."""
    switch_frames: tuple[PositiveInt, ...] = ()
    """Latent frames of which each stream draws one, at whose chunk its prompt switches to the second one of its sample
    (`data.switch_prompts`); empty for no switches."""
    on_switch: OnSwitch = "recache"
    """Past at a switch: `recache` computes it anew with the new prompt, `keep` changes nothing, `flush` leaves the sink
    and the last chunk, `cut` begins an empty one."""
    student_learning_rate: LearningRate = 1e-5
    """AdamW learning rate of the student."""
    critic_learning_rate: LearningRate = 2e-6
    """AdamW learning rate of the critic."""

    @model_validator(mode="after")
    def _switches(self) -> StreamingTuningConfig:
        if self.max_frames and any(frame >= self.max_frames for frame in self.switch_frames):
            raise ValueError(f"switch_frames: below max_frames {self.max_frames}, got {list(self.switch_frames)}")
        if self.min_new_frames and self.scored_frames and self.min_new_frames > self.scored_frames:
            raise ValueError(f"min_new_frames: at most scored_frames {self.scored_frames}, got {self.min_new_frames}")
        if self.scored_frames and self.scored_frames < self.reach.chunk:
            raise ValueError(f"scored_frames: at least a chunk of {self.reach.chunk}, got {self.scored_frames}")
        return self

    @property
    def switches(self) -> bool:
        return bool(self.switch_frames)

    def longest(self, frames: int) -> int:
        return self.max_frames or STREAM * frames

    def switch_starts(self, frames: int) -> list[int]:
        """First frames of the chunks where streams switch, of a model whose videos have ``frames`` latent frames."""
        first, chunk = self._first_chunk(frames), self.reach.chunk
        return [first + chunk * max(0, -(-(frame - first) // chunk)) for frame in self.switch_frames]

    def _first_chunk(self, frames: int) -> int:
        return spans(min(self.scored_frames or frames, frames), self.reach.chunk)[0][1]

    def check_frames(self, frames: int) -> None:
        super().check_frames(frames)
        if (self.min_new_frames or 1) > (scored := self.scored_frames or frames):
            raise UserError(f"method.min_new_frames: at most the {scored} scored frames, got {self.min_new_frames}")
        chunk, longest, last = self.reach.chunk, self.longest(frames), max(self.switch_starts(frames), default=0)
        if last + chunk > longest:
            possible = range(self._first_chunk(frames), longest - chunk + 1, chunk)
            hint = f"{possible[-1]} is the last that would do" if possible else "none would do"
            raise UserError(
                f"method.switch_frames: a switch at latent frame {last} leaves no chunk of {chunk} in the longest "
                f"stream (method.max_frames {longest}); {hint}"
            )
