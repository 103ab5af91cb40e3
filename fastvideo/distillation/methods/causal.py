"""Part of a method whose student generates chunk by chunk."""

from __future__ import annotations

from typing import Any

from fastvideo.distillation.chunks import Reach


class Causal:
    """First base of such a method; its config has :class:`~fastvideo.distillation.config.causal.CausalOptions`."""

    @classmethod
    def reach_of(cls, config: Any) -> Reach:
        """Frames that a chunk of the student sees."""
        return config.reach  # type: ignore[no-any-return]

    @classmethod
    def context_time_of(cls, config: Any) -> float:
        """Time at which the student's finished chunks are committed."""
        return config.context_time  # type: ignore[no-any-return]
