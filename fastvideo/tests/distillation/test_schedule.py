"""The ladder: published step lists become real times once, and a wrong ladder names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from pydantic import BaseModel, ValidationError

from fastvideo.distillation.config.base import Guidance
from fastvideo.distillation.grids import published_ladder, uniform_ladder
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import first_steps

PUBLISHED = (1000, 750, 500, 250)


@pytest.mark.parametrize(
    ("shift", "times"),
    [
        (1.0, (1, 0.75, 0.5, 0.25)),
        (3.0, (1, 0.9, 0.75, 0.5)),
        (5.0, (1, 0.9375, 5 / 6, 0.625)),
        (8.0, (1, 0.96, 8 / 9, 8 / 11)),
    ],
)
def test_warped_steps_give_the_golden_table(shift: float, times: tuple[float, ...]) -> None:
    assert published_ladder(PUBLISHED, shift=shift).times == pytest.approx(times, abs=1e-12)


def test_literal_steps_ignore_the_shift() -> None:
    assert published_ladder(PUBLISHED, shift=5.0, warp=False).times == (1.0, 0.75, 0.5, 0.25)


def test_a_trailing_zero_is_dropped() -> None:
    with_zero, without = (published_ladder(steps, shift=5.0) for steps in ((*PUBLISHED, 0), PUBLISHED))
    assert with_zero == without


def test_a_zero_in_the_middle_is_not_dropped() -> None:
    with pytest.raises(UserError, match="rises from 0"):
        published_ladder((1000, 0, 500))


def test_uniform_is_the_teachers_sampler() -> None:
    assert uniform_ladder(4).times == (1.0, 0.75, 0.5, 0.25)
    assert uniform_ladder(4, shift=3.0) == published_ladder(PUBLISHED, shift=3.0)
    assert len(uniform_ladder(50, shift=3.0)) == 50


def test_a_48_step_teacher_visits_the_4_step_ladder() -> None:
    teacher = uniform_ladder(48, shift=5.0).times
    assert [teacher[i] for i in (0, 12, 24, 36)] == pytest.approx(published_ladder(PUBLISHED, shift=5.0).times)


def test_the_end_is_appended() -> None:
    assert Ladder((1.0, 0.5)).with_end == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((), "at least one time is needed"),
        ((1000.0, 750.0), "starts at 1000.0, above 1 (pure noise)"),
        ((1.0, 0.5, 0.5), "repeats 0.5"),
        ((1.0, 0.25, 0.5), "rises from 0.25 to 0.5"),
        ((1.0, 0.5, 0.0), "ends at 0.0; the final 0 is implied"),
        ((1.0, -0.5), "ends at -0.5"),
        ((1.0, float("nan")), "every time must be a finite number"),
    ],
)
def test_a_bad_ladder_says_what_is_wrong(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Ladder(times)


@pytest.mark.parametrize(("count", "times"), [(1, (1.0,)), (3, (1.0, 0.7, 0.4))])
def test_first_gives_the_ladders_a_student_was_trained_for(count: int, times: Sequence[float]) -> None:
    assert first_steps(Ladder((1.0, 0.7, 0.4)), count).times == times


@pytest.mark.parametrize("count", [0, 2, 4])
def test_first_refuses_any_other_count(count: int) -> None:
    with pytest.raises(UserError, match=rf"it runs with --steps 3 or --steps 1, not {count}"):
        first_steps(Ladder((1.0, 0.7, 0.4)), count)
    with pytest.raises(UserError, match=r"it runs with --steps 1, not 4"):
        first_steps(Ladder((1.0,)), 4)


class Options(BaseModel):
    """A config with a guidance field."""

    guidance: Guidance


@pytest.mark.parametrize(
    ("written", "standard"),
    [(4.5, 4.5), (1, 1.0), ({"extra": 3.5}, 4.5), ({"extra": 0}, 1.0), ({"standard": 3.0}, 3.0)],
)
def test_guidance_conventions_become_the_standard_one(written: object, standard: float) -> None:
    assert Options.model_validate({"guidance": written}).guidance == standard


@pytest.mark.parametrize(
    ("written", "standard"),
    [
        ([[0.875, 4], [0, 3]], ((0.875, 4.0), (0.0, 3.0))),
        ([[0.5, {"extra": 2}], [0, 1]], ((0.5, 3.0), (0.0, 1.0))),
        ([[0.875, 4], [0, 4]], 4.0),
        ([[0, 1]], 1.0),
    ],
)
def test_guidance_by_time_is_converted_once_and_survives_json(written: object, standard: object) -> None:
    found = Options.model_validate({"guidance": written})
    assert found.guidance == standard
    assert Options.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    "written",
    [[], [4.0], [[0, 4], [0.5, 3]], [[0.5, 4]], [[1.5, 4], [0, 3]], [[0.5, -1], [0, 3]], [[0.5, "4"], [0, 3]]],
)
def test_guidance_by_time_that_does_not_cover_all_times_is_refused(written: object) -> None:
    with pytest.raises(ValidationError, match="guidance"):
        Options.model_validate({"guidance": written})


@pytest.mark.parametrize("written", [{"plus": 3.5}, {"extra": 1, "standard": 2}, {}, -0.5, {"extra": -2}])
def test_an_unknown_convention_or_negative_guidance_is_refused(written: object) -> None:
    with pytest.raises(ValidationError, match="guidance"):
        Options.model_validate({"guidance": written})
