"""``benchmarks/time_to_quality.py``: one short training, measured at its only mark."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, run from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("time_to_quality")


@pytest.mark.slow
def test_a_run_is_trained_once_and_measured_by_weights_and_steps(benchmark: ModuleType, tmp_path: Path) -> None:
    settings = ("ema.post_hoc.every=1", "method.generator_update_interval=2", "data.batch_size=2")
    run = benchmark.Run("dmd2", 0, settings, (1,), tmp_path)
    arguments = benchmark.Arguments(
        methods=("dmd2",), set=settings, marks=(1,), prompts=4, split="train", runs=tmp_path
    )
    benchmark.do(run, arguments)
    rows = benchmark.measured(run)
    known = {(row["mark"], row["weights"], row["steps"]) for row in rows}
    assert {(1, weights, steps) for weights in ("live", "averaged") for steps in (4, 2, 1)} < known
    assert len(known) == len(rows)
    trained = json.loads(run.training.read_text())
    assert trained["marks"]["1"]["seconds"] >= 1
    benchmark.do(run, arguments)
    assert benchmark.measured(run) == rows, "a run that is there is measured once"
