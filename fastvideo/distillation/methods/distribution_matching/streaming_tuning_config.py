"""Options of streaming tuning."""

from __future__ import annotations

from pydantic import model_validator

from fastvideo.distillation.causal_rollout import OnSwitch
from fastvideo.distillation.methods.distribution_matching.self_forcing_config import SelfForcingConfig
from fastvideo.ranges import LearningRate, PositiveInt


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
