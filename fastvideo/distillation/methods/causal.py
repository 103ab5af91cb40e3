"""Part of methods for whole videos whose config may make the student generate chunk by chunk."""

from __future__ import annotations

from typing import Any

from fastvideo.distillation.causal_rollout import forced
from fastvideo.distillation.chunks import Masked, Reach
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch


class Forced:
    """First base of a method that trains by teacher forcing where its config, with
    :class:`~fastvideo.distillation.config.causal.ForcedOptions`, has a ``reach``, and on whole videos otherwise."""

    config: Any
    rng: RandomStreams

    def past(self, batch: Batch) -> Masked | None:
        """Clean chunks that student and teacher see before each one; ``None`` for whole videos."""
        reach: Reach | None = self.config.reach
        return None if reach is None else forced(reach, batch.latents, self.config.context_time, self.rng)
