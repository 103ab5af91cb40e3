"""Goals of a streaming student: its figures beside its teacher's, the untrained sampler's and real streams'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastvideo.evaluation.metrics import ATTRIBUTES, rounded
from fastvideo.evaluation.statistics import Estimate
from fastvideo.evaluation.streams.measure import StreamRow

INFINITE = float("inf")


@dataclass(frozen=True)
class Goal:
    """A figure and the range in which a good student has it; an undefined figure misses it."""

    name: str
    value: float
    lowest: float = -INFINITE
    highest: float = INFINITE

    @property
    def met(self) -> bool:
        return self.lowest <= self.value <= self.highest

    def to_dict(self) -> dict[str, Any]:
        """Value, ends of the range (``None`` if open or undefined), and the verdict, for JSON."""
        ends = {name: rounded(getattr(self, name)) for name in ("value", "lowest", "highest")}
        return {**ends, "met": self.met}


def short_goals(teacher: StreamRow, untrained: StreamRow, student: StreamRow) -> Iterator[Goal]:
    """Goals at the length of the training, each in the window where it is furthest from being met.

    Accuracies where the prompt names the attribute; ratios of Frechet distances.
    """
    for name in ATTRIBUTES:
        yield Goal(f"teacher_{name}", float(_curve(teacher, name).min()), 0.95)
    for name in ATTRIBUTES:
        worst = float((_curve(student, name) - _curve(teacher, name)).min())
        yield Goal(f"student_{name}_over_teacher", worst, -0.03)
    yield Goal(
        "frechet_over_teacher", float((_curve(student, "frechet") / _curve(teacher, "frechet")).max()), highest=1.25
    )
    ratio = _curve(student, "frechet") / _curve(untrained, "frechet")
    yield Goal("frechet_over_untrained", float(ratio.max()), highest=0.5)


def long_goals(student: StreamRow) -> Iterator[Goal]:
    """Goals beyond the length of the training: drops from first to last window, motion, light, prompt switches."""
    for name in ("digit_drop", "colour_drop"):
        yield Goal(name, _figure(student, name).value, highest=0.03)
    yield Goal("speed_ratio", _figure(student, "speed_last").value, 0.9, 1.1)
    real = _figure(student, "real_ink_slope")
    yield Goal("brightness_slope", _figure(student, "ink_slope").value, real.low, real.high)
    yield Goal("switch_latency", _figure(student, "switch_median").value, highest=13.0)
    yield Goal("switch_kept", _figure(student, "kept_during").value, 0.95)


def bias_goals(student: StreamRow, causvid: StreamRow) -> Iterator[Goal]:
    """Exposure bias, as a difference of Frechet distances, below that of a CausVid student, in every window."""
    ours, theirs = (_curve(row, "frechet_bias") for row in (student, causvid))
    yield Goal("exposure_bias_over_causvid", float((ours - theirs).max()), highest=0.0)


def _curve(row: StreamRow, name: str) -> Tensor:
    return row.series[name].values


def _figure(row: StreamRow, name: str) -> Estimate:
    figure = row.figures[name]
    assert isinstance(figure, Estimate)
    return figure
