"""Config section of averaged weights."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import Field, field_validator

from fastvideo.distillation.config.base import Section
from fastvideo.ranges import Beta, NonNegativeInt, PositiveInt, RelativeDeviation


class PostHocConfig(Section):
    """Averages of the student that are stored while it trains, so that `fastvideo average` makes any other afterwards
    (arXiv 2312.02696); see `docs/averages.md`."""

    stds: Annotated[tuple[RelativeDeviation, ...], Field(min_length=2, max_length=8)] = (0.05, 0.1)
    """Widths of the stored averages, relative to the updates so far (sigma_rel in the paper). Each costs a copy of the
    trained weights in memory."""
    every: PositiveInt = 4
    """Updates of the student per snapshot, doubled whenever there would be more than `keep`."""
    keep: Annotated[int, Interval(ge=4, le=1024)] = 16
    """Most updates with a snapshot beside the last one; with fewer, wide averages are less exact."""
    precision: Literal["float16", "float32"] = "float16"
    """Numbers in the files (folder `snapshots`); averages are kept in float32."""

    @field_validator("stds")
    @classmethod
    def _differ(cls, stds: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{std:g}" for std in stds}) < len(stds):
            raise ValueError(f"the averages must differ, got {list(stds)}")
        return stds


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
    post_hoc: PostHocConfig | None = None
    """Snapshots of the student from which an average is chosen after the run; `{}` takes the defaults."""
