"""Back-pressure: at most two chunks are made ahead of the one that plays."""

from __future__ import annotations

import pytest

from fastvideo.live.clock import LEAD, Clock


class Now:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize("work", [0.0, 0.1, 0.3])
def test_a_worker_that_is_fast_enough_is_never_late_and_never_far_ahead(work: float) -> None:
    now = Now()
    clock = Clock(12.0, now)
    for chunk in range(40):
        now.seconds += clock.wait
        assert chunk < 3 or clock.ahead >= 4 - 1e-6
        now.seconds += work
        clock.arrived(4 if chunk else 1)
        assert clock.ahead <= LEAD * 4 + 1e-6
    assert clock.full == 8


def test_a_worker_that_is_too_slow_never_waits() -> None:
    now = Now()
    clock = Clock(12.0, now)
    for _ in range(10):
        assert clock.wait == 0.0
        now.seconds += 0.5
        clock.arrived(4)
    assert clock.ahead == pytest.approx(4), "what was late is shown at once, not made up for"


def test_a_clock_that_nobody_needed_for_a_while_begins_anew() -> None:
    now = Now()
    clock = Clock(12.0, now)
    clock.arrived(4)
    now.seconds += 1000
    assert clock.ahead == 0.0
    clock.arrived(4)
    assert clock.ahead == pytest.approx(4)
