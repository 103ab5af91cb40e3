"""``benchmarks/leaderboard.py``: its parts, and the page from figures that are given; nothing is trained here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.dom import minidom

import pytest
import torch

from fastvideo.distillation.config.causal import reach_of
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, run from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("leaderboard")


def test_a_sub_ladder_takes_rungs_evenly_and_makes_up_those_that_are_missing(board: ModuleType) -> None:
    ladder = [1.0, 0.75, 0.5, 0.25]
    assert board.sub_ladder(ladder, 4) == tuple(ladder)
    assert board.sub_ladder(ladder, 2) == (1.0, 0.5)
    assert board.sub_ladder(ladder, 1) == (1.0,)
    assert board.sub_ladder([1.0], 4) == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(("text", "seconds"), [("20s", 20), ("5m", 300), ("0.5h", 1800)])
def test_a_budget_is_a_time(text: str, seconds: float, board: ModuleType) -> None:
    assert board.Arguments(budget=text).seconds == seconds


@pytest.mark.parametrize("text", ["5", "0s", "five minutes", "-3m"])
def test_another_budget_is_refused(text: str, board: ModuleType) -> None:
    with pytest.raises(UserError, match="20s, 5m or 1h"):
        _ = board.Arguments(budget=text).seconds


def test_every_tiny_recipe_takes_part_and_another_method_is_refused(board: ModuleType) -> None:
    recipes = {path.stem.removeprefix("tiny_wan_") for path in (ROOT / "examples/distillation").glob("tiny_wan_*.yaml")}
    whole = {name for name in METHODS if reach_of(load_method(name).Config()) is None}
    assert set(board.chosen(board.Arguments())) == recipes & whole - {"sft"}
    assert board.chosen(board.Arguments(methods=("sft",))) == ["sft"]
    with pytest.raises(UserError, match="--methods dmd3"):
        board.chosen(board.Arguments(methods=("dmd3",)))
    with pytest.raises(UserError, match="--methods self_forcing: its student streams"):
        board.chosen(board.Arguments(methods=("self_forcing",)))


def test_a_process_is_measured_and_a_failing_one_named(board: ModuleType, tmp_path: Path) -> None:
    cost = board.measured_process(["timeit", "-n", "1", "-r", "1", "sum(range(10 ** 6))"], tmp_path / "log.txt")
    assert cost["peak_rss_mb"] > 1
    assert cost["cpu_seconds"] <= cost["wall_seconds"] + 1
    with pytest.raises(UserError, match=r"exit code 1: see .*log\.txt"):
        board.measured_process(["no_such_module"], tmp_path / "log.txt")


def figures(distance: float) -> dict[str, Any]:
    names = ("digit_accuracy", "colour_accuracy", "direction_accuracy", "frechet", "frechet_pixel", "diversity")
    row = dict.fromkeys(names, distance)
    return {**row, "network_calls": 4, "frechet_floor": 1.3, "intervals": {name: [0.0, 1.0] for name in names}}


def test_the_page_holds_every_row_and_the_closest_comes_first(board: ModuleType, tmp_path: Path) -> None:
    cost = {"wall_seconds": 9.0, "peak_rss_mb": 700, "cpu_seconds": 8.0, "train_steps": 30}
    results, folders, videos = [], {}, {}
    for name, distance in {"teacher": 2.5, "dmd2": 4.0, "ladd": 3.0}.items():
        steps = ("50", "4", "2", "1") if name == "teacher" else ("4", "2", "1")
        for seed in [None] if name == "teacher" else [3, 4]:
            results += board.entries(name, dict.fromkeys(steps, figures(distance + (seed == 4))), cost, seed)
        folders[name] = tmp_path / name
        videos[name] = dict.fromkeys(steps, torch.zeros(2, 3, 3, 8, 8))
        (folders[name] / "run").mkdir(parents=True)
        lines = [{"step": 5, "cpu_seconds": 2.0}, {"step": 5, "validation/ema/frechet": 2 * distance}]
        (folders[name] / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = board.Arguments(seeds=(3, 4), out=tmp_path / "docs" / "results.md", remark="A quiet machine.")
    environment = {"revision": "0123456789", "torch": "2"}
    sys.modules["leaderboard_page"].write_page(arguments, results, folders, videos, {"kd": "no walks"}, environment)
    page = arguments.out.read_text()
    assert page.index("| ladd | 4 |") < page.index("| dmd2 | 4 |")
    assert "--budget 5m --seeds 3 4`" in page
    assert "| dmd2 | 4 | 4 | 4.500 | 4.500 | 4.500 | 4.50 | 4.00-5.00 | 4 | 4.50 |" in page
    assert "| teacher | 50 | 4 | 2.500 | 2.500 | 2.500 | 2.50 | - | 2 | 2.50 |" in page
    assert all(
        text in page for text in ("revision 0123456,", "Not measured: `kd`: no walks", "A quiet machine.", "1.30")
    )
    rows = json.loads((tmp_path / "docs" / "results.json").read_text())
    kept = [(row["method"], row["seed"], row["steps"]) for row in rows]
    assert kept[3:8] == [("teacher", None, 1), *(("dmd2", 3, steps) for steps in (4, 2, 1)), ("dmd2", 4, 4)]
    for file in ("frechet-steps.svg", "frechet-seconds.svg"):
        drawn = minidom.parse(str(tmp_path / "docs" / "images" / "leaderboard" / file))
        assert len(drawn.getElementsByTagName("polyline")) == 2
    assert (tmp_path / "docs" / "images" / "leaderboard" / "gallery.gif").is_file()


def test_a_chart_is_as_wide_as_its_longest_name_needs(board: ModuleType) -> None:
    page = importlib.import_module("leaderboard_page")
    short, long = (
        minidom.parseString(page.chart("distance", "seconds", {name: [(1.0, 2.0), (2.0, 1.0)]})).documentElement
        for name in ("dmd2", "ladd " + 6 * "method.option=1 ")
    )
    assert short is not None
    assert long is not None
    assert int(short.getAttribute("width")) == page.WIDTH
    text = long.getElementsByTagName("text")[-3]
    end = float(text.getAttribute("x")) + 6.5 * len(text.firstChild.nodeValue)
    assert text.firstChild.nodeValue.startswith("ladd ")
    assert end < int(long.getAttribute("width"))


def test_each_seed_has_its_run_and_only_the_first_ones_are_validated_on_the_way(
    board: ModuleType, tmp_path: Path
) -> None:
    arguments = board.Arguments(seeds=(2, 0), budget="20s", runs=tmp_path)
    runs = board.runs_of(arguments, "dmd2")
    assert [(run.folder.relative_to(tmp_path), run.curve) for run in runs] == [
        (Path("20s/dmd2-2"), True),
        (Path("20s/dmd2-0"), False),
    ]
    assert runs[0].identity != runs[1].identity


def test_a_run_of_another_recipe_is_not_taken_for_this_one(board: ModuleType, tmp_path: Path) -> None:
    (run,) = board.runs_of(board.Arguments(runs=tmp_path), "dmd2")
    run.folder.mkdir(parents=True)
    (run.folder / "training.json").write_text(json.dumps({"identity": run.identity, "cost": {"train_steps": 9}}))
    assert run.cost == {"train_steps": 9}
    assert board.on_the_page(board.Arguments(runs=tmp_path, methods=("ladd",))) == ["dmd2", "ladd"]
    (run.folder / "training.json").write_text(
        json.dumps({"identity": {**run.identity, "recipe": "another"}, "cost": {"train_steps": 9}})
    )
    assert run.cost is None
    assert board.on_the_page(board.Arguments(runs=tmp_path, methods=("ladd",))) == ["ladd"]
