"""``benchmarks/stream.py`` with a few calls and much slack: what it measures cannot turn round unseen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import stream

    return stream


def test_a_cached_call_is_cheaper_than_the_whole(stream: Any) -> None:
    """Of 129 latent frames, with the window of a stream; 7 times at rest."""
    calls = stream.recompute_calls(stream.tiny(), 129, stream.WINDOW)
    cached, whole = stream.median_seconds(time.process_time, 5, *calls)
    assert whole > 3 * cached


def test_the_loop_by_hand_makes_the_same_frames(stream: Any) -> None:
    found = stream.loop(time.process_time, 5)
    assert found["frames_differ_by"] <= 1
    assert found["ratio"] < 1.5


@pytest.mark.slow
def test_a_long_stream_costs_as_much_as_a_short_one(stream: Any) -> None:
    found = stream.position(time.process_time, 20)
    assert found["ratio"] < 1.2
    assert stream.memory(150)["growth_mb"] < 10
