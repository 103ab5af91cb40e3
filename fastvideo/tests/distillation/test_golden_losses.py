"""Every method and family still gives the losses that are committed in ``golden/losses.json``.

The first three steps here; ``benchmarks/loss_compare.py`` writes the file, and compares whole runs bit for bit.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastvideo.cli import main
from fastvideo.distillation.builder import METHODS

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
STEPS = 3
RELATIVE = {"tcm": 1e-3}
"""TCM's loss is the distance of two nearly equal outputs, so it moves thirty times as far as the others'."""
DEFAULT_RELATIVE = 1e-4
"""Another CPU adds in another order. Measured over 20 steps: weights changed by 1e-7 of themselves, about one step of
float32, move the losses by at most 8e-6 (TCM's by 1e-4); the kernels of the oldest CPUs (ATEN_CPU_CAPABILITY=default,
MKL_CBWR=COMPATIBLE, ONEDNN_MAX_CPU_ISA=SSE41) by 1.2e-5 (TCM's by 2.5e-4), in the first three steps by 4.4e-6 (8e-5).
So three steps have a margin of ten and more."""


def benchmark() -> ModuleType:
    """``benchmarks/loss_compare.py``."""
    spec = importlib.util.spec_from_file_location("loss_compare", ROOT / "benchmarks" / "loss_compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_compare"] = module
    spec.loader.exec_module(module)
    return module


loss_compare = benchmark()
COMMITTED: dict[str, dict[str, list[float | None]]] = json.loads((GOLDEN / "losses.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs share their encoded videos."""
    return tmp_path_factory.mktemp("golden")


def logged(run: dict[str, list[float | None]]) -> dict[str, float]:
    """The losses of the first steps, by name and step; a step without that loss is not there."""
    return {
        f"{key} {i}": value
        for key, series in run.items()
        for i, value in enumerate(series[:STEPS])
        if value is not None
    }


def test_every_method_has_golden_losses() -> None:
    assert set(COMMITTED) == set(loss_compare.recipes())
    assert {name.partition("-")[0] for name in COMMITTED} == set(METHODS)
    assert {len(series) for run in COMMITTED.values() for series in run.values()} == {loss_compare.STEPS}


def test_first_difference() -> None:
    """The last bit counts, so does a missing value; of several metrics the one that differs first is named."""
    run = {"a/loss": [1.0, 0.1, 0.5], "b/loss": [None, 2.0, 3.0]}
    assert loss_compare.first_difference(run, run) is None
    later = {"a/loss": [1.0, 0.1, 0.25], "b/loss": [None, 2.0000000000000004, 3.0]}
    assert loss_compare.first_difference(run, later) == (2, "b/loss: 2.0, now 2.0000000000000004")
    assert loss_compare.first_difference(run, {**run, "b/loss": [1.0, 2.0, 3.0]}) == (1, "b/loss: None, now 1.0")
    assert loss_compare.first_difference(run, {"a/loss": run["a/loss"]}) == (1, "metrics b/loss are on one side alone")


@pytest.mark.parametrize("name", COMMITTED)
def test_golden_losses(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    method = name.split("-")[0]
    for arguments in loss_compare.commands({name: loss_compare.recipes([method], STEPS)[name]}, folder):
        assert main(arguments) == 0
    found = loss_compare.losses_of(loss_compare.read_run(folder / name))
    tolerance = RELATIVE.get(method, DEFAULT_RELATIVE)
    assert logged(found) == pytest.approx(logged(COMMITTED[name]), rel=tolerance, abs=0)
