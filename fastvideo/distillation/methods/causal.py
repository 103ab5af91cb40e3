"""Parts of methods whose students generate chunk by chunk, always or by their config."""

from __future__ import annotations

from typing import Any, ClassVar

from fastvideo.distillation.causal_rollout import forced
from fastvideo.distillation.chunks import Masked, Reach
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch


class Causal:
    """First base of such a method; its config has :class:`~fastvideo.distillation.config.causal.CausalOptions`."""

    @classmethod
    def reach_of(cls, config: Any) -> Reach | None:
        """Frames that a chunk of the student sees."""
        return config.reach  # type: ignore[no-any-return]

    @classmethod
    def context_time_of(cls, config: Any) -> float:
        """Time at which the student's finished chunks are committed."""
        return config.context_time  # type: ignore[no-any-return]


class Forced(Causal):
    """First base of a method that trains by teacher forcing where its config, with
    :class:`~fastvideo.distillation.config.causal.ForcedOptions`, has a ``reach``, and on whole videos otherwise."""

    autoregressive_roles: ClassVar[tuple[str, ...]] = ("teacher",)
    config: Any
    rng: RandomStreams

    @classmethod
    def trusts_teachers(cls, config: Any) -> bool:
        """True if the teacher's folder need not say that it generates chunk by chunk."""
        return config.allow_bidirectional_teacher  # type: ignore[no-any-return]

    def past(self, batch: Batch) -> Masked | None:
        """Clean chunks that student and teacher see before each one; ``None`` for whole videos."""
        reach: Reach | None = self.config.reach
        return None if reach is None else forced(reach, batch.latents, self.config.context_time, self.rng)
