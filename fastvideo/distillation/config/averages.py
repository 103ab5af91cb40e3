"""Config section of averaged weights."""

from __future__ import annotations

from fastvideo.distillation.config.base import Section
from fastvideo.ranges import Beta, NonNegativeInt


class EMAConfig(Section):
    """Averaged weights; those of the student are the result."""

    enabled: bool = True
    """Keep averages."""
    roles: tuple[str, ...] = ("student",)
    """Trained roles that have an average."""
    decay: Beta = 0.98
    """Decay per update of the role."""
    start_step: NonNegativeInt = 0
    """Step up to which the average copies the live weights."""
