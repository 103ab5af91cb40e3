"""Goals of streaming students, from figures that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastvideo.evaluation.statistics import Estimate
from fastvideo.evaluation.streams.goals import Goal, bias_goals, long_goals, short_goals
from fastvideo.evaluation.streams.measure import StreamRow
from fastvideo.tests.evaluation.streams.rows import line, stream_row


def row(kind: str = "student", **curves: tuple[float, float]) -> StreamRow:
    """Figures without drift, but for ``curves`` with these first and last values."""
    base = stream_row(0.0, kind, 4, 4)
    return replace(base, series={**base.series, **{name: line(*ends) for name, ends in curves.items()}})


def missed(goals: list[Goal]) -> list[str]:
    return [goal.name for goal in goals if not goal.met]


def test_the_window_furthest_from_a_goal_counts() -> None:
    teacher, untrained = row("teacher", digit=(0.98, 0.96), frechet=(10, 12)), row("untrained", frechet=(40, 20))
    student = row(digit=(0.99, 0.90), frechet=(11, 14))
    goals = list(short_goals(teacher, untrained, student))
    values = {goal.name: goal.value for goal in goals}
    assert missed(goals) == ["student_digit_over_teacher", "frechet_over_untrained"]
    assert values["teacher_digit"] == pytest.approx(0.96)
    assert values["student_digit_over_teacher"] == pytest.approx(-0.06)
    assert values["frechet_over_teacher"] == pytest.approx(14 / 12)
    assert values["frechet_over_untrained"] == pytest.approx(14 / 20)


def long_row(**figures: float) -> StreamRow:
    base = row()
    known = {"digit_drop": 0.0, "colour_drop": 0.0, "ink_slope": 0.01, "real_ink_slope": 0.0, **figures}
    estimates = {name: Estimate(value, value - 0.02, value + 0.02, 64) for name, value in known.items()}
    return replace(base, figures={**base.figures, **estimates})


def test_goals_of_long_streams() -> None:
    assert missed(list(long_goals(long_row()))) == []
    spoilt = {"digit_drop": 0.05, "speed_last": 0.7, "ink_slope": 0.03, "kept_during": 0.5}
    assert missed(list(long_goals(long_row(**spoilt)))) == [
        *("digit_drop", "speed_ratio", "brightness_slope", "switch_kept")
    ]


@pytest.mark.parametrize("latency", [float("inf"), float("nan")])
def test_a_switch_that_never_shows_misses_its_goal(latency: float) -> None:
    goal = next(goal for goal in long_goals(long_row(switch_median=latency)) if goal.name == "switch_latency")
    assert goal.to_dict() == {"value": None, "lowest": None, "highest": 13.0, "met": False}


def test_exposure_bias_against_another_student() -> None:
    ours, theirs = row(frechet_bias=(1, 2)), row(frechet_bias=(2, 6))
    assert missed(list(bias_goals(ours, theirs))) == []
    assert missed(list(bias_goals(theirs, ours))) == ["exposure_bias_over_causvid"]
