"""Trackers that raise, hang or are not there: the run goes on, says so once, and ends in time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.schema import TrackingConfig
from fastvideo.distillation.engine import tracking as trackers
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.training.data import build_data
from fastvideo.training.run import build_trainer, run


class Kept:
    """A tracker that works."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


class Raising(Kept):
    """A tracker whose server refuses the second line."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        if len(self.steps) == 2:
            raise ConnectionError("no route to host")


class Hanging(Kept):
    """A tracker whose server never answers."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        threading.Event().wait()


class Unreachable(Kept):
    """A tracker that cannot even be opened."""

    def __init__(self) -> None:
        raise SystemExit("login needed")


def train(values: dict[str, Any], **more: Any) -> tuple[list[str], float]:
    """Train the analytic run with these trackers; what was said, and the seconds it took."""
    config = validate(run_schema("analytic", "dmd2"), values, "test")
    Path(config.output).mkdir()
    adapter = build_adapter(config)
    said: list[str] = []
    tracker = Tracker(Path(config.output), options=TrackingConfig(backends=()), more=more)
    tracker.say = said.append  # type: ignore[method-assign]
    trainer = build_trainer(config, adapter, build_method(config, adapter), tracker, Processes())
    begin = time.monotonic()
    trainer.run(build_data(config, adapter, Processes())[0])
    return said, time.monotonic() - begin


def lines(values: dict[str, Any]) -> list[int]:
    return [json.loads(line)["step"] for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_that_works_gets_every_line_and_is_closed(analytic_values: dict[str, Any]) -> None:
    kept = Kept()
    assert train(analytic_values, kept=lambda: kept)[0] == []
    assert kept.steps == lines(analytic_values) == [3, 6, 9, 12]
    assert kept.closed


def test_a_tracker_that_raises_is_left_out_with_one_warning(analytic_values: dict[str, Any]) -> None:
    raising = Raising()
    said, _ = train(analytic_values, broken=lambda: raising)
    assert said == [
        "tracker broken failed (ConnectionError: no route to host): it is dropped; metrics.jsonl has everything"
    ]
    assert raising.steps == [3, 6]
    assert lines(analytic_values) == [3, 6, 9, 12]


def test_a_tracker_that_cannot_be_opened_stops_nothing(analytic_values: dict[str, Any]) -> None:
    said, _ = train(analytic_values, away=Unreachable)
    assert [line.split(":")[0] for line in said] == ["tracker away failed (SystemExit"]
    assert lines(analytic_values) == [3, 6, 9, 12]


def test_a_tracker_that_hangs_costs_its_grace_at_the_end_and_no_more(
    analytic_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "GRACE", 0.3)
    said, seconds = train(analytic_values, silent=Hanging)
    assert len(said) == 1
    assert said[0].startswith("tracker silent has not finished within 0.3 s")
    assert seconds < 10
    assert lines(analytic_values) == [3, 6, 9, 12]


def test_a_tracker_that_falls_behind_is_left_out_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CAPACITY", 3)
    said: list[str] = []
    isolated = trackers.Isolated("silent", Hanging, said.append)
    begin = time.monotonic()
    for step in range(100):
        isolated.log({"loss": 1.0}, step)
    isolated.close()
    assert time.monotonic() - begin < 1.0
    assert len(said) == 1
    assert "is 3 lines behind" in said[0]


@pytest.mark.parametrize("name", trackers.EXTRAS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_extra_to_install(
    analytic_values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    config = validate(run_schema("analytic", "dmd2"), analytic_values | {"tracking": {"backends": [name]}}, "test")
    with pytest.raises(UserError, match=rf"{name} is not installed: pip install 'fastvideo-distillation\[{name}\]'"):
        run(config)
    assert not (Path(analytic_values["output"]) / "config.yaml").exists()
