"""All figures by name, as page and terminal show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo.evaluation.tables import Cell

Metrics = Mapping[str, Any]
SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""
VBENCH_DIMENSIONS = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)
"""Dimensions that VBench measures on videos of any prompts (its mode ``custom_input``)."""


@dataclass(frozen=True)
class Figure:
    """A measured quantity: its key, its heading, its digits, and the better direction: up, down or to ``target``."""

    key: str
    head: str
    digits: int
    lower_is_better: bool = False
    percent: bool = False
    floor: str = ""
    target: float | None = None

    def rounded(self, value: float) -> float:
        """A value with the printed digits, never minus zero."""
        return round(value * (100 if self.percent else 1), self.digits) + 0.0

    def text(self, value: float | None, signed: bool = False) -> str:
        """Format a value; ``signed`` for differences, in percentage points where the figure is a percentage."""
        if value is None:
            return "n/a"
        text = f"{self.rounded(value):{'+' if signed else ''}.{self.digits}f}".replace("-", "\u2212")
        return f"{text}{SPACE}%" if self.percent and not signed else text

    def interval(self, low: float | None, high: float | None, signed: bool = False) -> str:
        """Format an interval, such as "8.4 to 9.9"."""
        return " to ".join(self.text(end, signed).removesuffix(f"{SPACE}%") for end in (low, high))

    def badness(self, value: float) -> float:
        """A number that is lower for a better value."""
        if self.target is not None:
            return abs(value - self.target)
        return value if self.lower_is_better else -value

    def cell(self, row: Metrics) -> Cell:
        """The value with its interval below it."""
        value, (low, high), count = row[self.key], row["intervals"][self.key], row["counts"][self.key]
        if value is None:
            return Cell("n/a")
        alike = self.percent and value == low == high and value in (0.0, 1.0)
        return Cell(self.text(value), f"{value * count:.0f} of {count}" if alike else self.interval(low, high))


WORLD = (
    Figure("digit_accuracy", "digit", 1, percent=True),
    Figure("colour_accuracy", "colour", 1, percent=True),
    Figure("direction_accuracy", "direction", 1, percent=True),
    Figure("frechet", "Fréchet", 1, lower_is_better=True, floor="frechet_floor"),
    Figure("frechet_pixel", "pixel distance", 0, lower_is_better=True, floor="frechet_pixel_floor"),
    Figure("diversity", "diversity", 2),
)
"""Figures of the tiny world, whose truth is known."""
RELATIVE = (
    Figure("fd_teacher", "distance from teacher", 2, lower_is_better=True, floor="fd_teacher_floor"),
    Figure("fd_data", "distance from data", 2, lower_is_better=True, floor="fd_data_floor"),
    Figure("prompt_match", "prompts found", 1, percent=True, floor="prompt_match_chance"),
    *(Figure(name, name, 2, target=1.0) for name in ("motion", "sharpness", "saturation", "flicker")),
    Figure("motion_distance", "motion distance", 3, lower_is_better=True),
    Figure("seed_diversity", "seed diversity", 2, target=1.0),
    Figure("clip_score", "CLIP score", 2),
    Figure("fvd", "FVD", 1, lower_is_better=True),
    *(Figure(f"vbench_{name}", f"VBench {name.replace('_', ' ')}", 3) for name in VBENCH_DIMENSIONS),
)
"""Figures against a teacher."""
STREAM = (
    Figure("digit_last", "digit", 1, percent=True, floor="digit_last_floor"),
    Figure("colour_last", "colour", 1, percent=True, floor="colour_last_floor"),
    Figure("direction_last", "direction", 1, percent=True, floor="direction_last_floor"),
    Figure("frechet_last", "Fréchet", 1, lower_is_better=True, floor="frechet_last_floor"),
    Figure("speed_last", "speed", 2, target=1.0),
    Figure("identity_last", "identity", 2, target=1.0),
    Figure("ink_slope", "brightness slope", 1, percent=True, target=0.0),
    Figure("saturation_slope", "saturation slope", 1, percent=True, target=0.0),
    Figure("seam_acceleration", "jerk at seams", 2, target=1.0),
    Figure("frechet_bias_last", "exposure bias", 1, lower_is_better=True),
)
"""Figures of streams: of the last window, slopes per 100 frames, and the whole stream."""
SWITCHES = (
    Figure("switch_median", "median latency", 0, lower_is_better=True),
    Figure("switch_p90", "90 % of latencies", 0, lower_is_better=True),
    Figure("switch_never", "never", 1, lower_is_better=True, percent=True),
    Figure("kept_before", "rest right before", 1, percent=True),
    Figure("kept_during", "rest right behind it", 1, percent=True),
    Figure("kept_after", "rest right at the end", 1, percent=True),
    Figure("continuous", "no jump", 1, percent=True),
)
"""Figures of prompt switches."""
CATALOGUE = (*WORLD, *RELATIVE, *STREAM, *SWITCHES)
DIGIT, FRECHET, FROM_TEACHER, LAST_FRECHET = WORLD[0], WORLD[3], RELATIVE[0], STREAM[3]


def present(row: Metrics, figures: Sequence[Figure] = CATALOGUE) -> list[Figure]:
    """The figures that a row holds."""
    return [figure for figure in figures if figure.key in row]


def distance_of(row: Metrics) -> Figure:
    """The distance by which models are compared: from real videos where the world is known (of streams, that of the
    last window), else from the teacher's.

    Without either, the first figure that the row holds.
    """
    return present(row, (FRECHET, LAST_FRECHET, FROM_TEACHER, *CATALOGUE))[0]
