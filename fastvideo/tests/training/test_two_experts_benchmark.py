"""``benchmarks/two_experts.py``: both students learn by one recipe, which every method it compares takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from fastvideo.training.distillation import parse

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("method", ["dmd2", "phased_dmd"])
def test_its_recipe_fits_every_method(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("two_experts")
    assert method in {"dmd2", *benchmark.Arguments().methods}
    _, config = parse(["--config", str(benchmark.recipe(tmp_path)), "--distill-method", method])
    assert config.distill_method == method
    assert config.method.rung_shares == ()
