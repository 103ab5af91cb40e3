"""The model card tells the truth: its lines run, its ladder, figures and licence are those of the run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler

from fastvideo.tests.inference.exporting import export


def test_the_cards_lines_run_as_they_stand(distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured = Path(shutil.copytree(distilled, tmp_path / "run"))
    (measured / "metrics.json").write_text(json.dumps({"student_4": {"network_calls": 4, "frechet": 11.25}, "x": 1}))
    export(measured, Path("shown"))
    card = Path("shown/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-video"
    assert yaml.safe_load(front)["license"] == "other"
    assert str(tmp_path) not in card
    assert str(distilled.parent) not in card
    assert "| frechet | 11.25 |" in body
    assert "| 1 | 0.937500 | 0.937500 |" in body
    assert json.loads((distilled / "environment.json").read_text())["revision"] in body
    (lines,) = re.findall(r"^```python\n(.*?)^```$", body, re.M | re.S)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert len(names["video"]) == 5
    assert Path("video.gif").stat().st_size > 0


def test_the_base_models_licence_is_passed_on(student: Callable[..., Path], tmp_path: Path) -> None:
    source = student()
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: someone/theirs\n---\n# Theirs\n")
    front = yaml.safe_load((export(source, tmp_path / "out") / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("mit", "someone/theirs")


def test_a_ladder_that_no_stock_scheduler_yields_comes_with_a_warning(
    student: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = student(ladder=[1.0, 0.9, 0.2, 0.1])
    out = export(source, tmp_path / "out")
    said = capsys.readouterr().err
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    scheduler.set_timesteps(4)
    instead = " ".join(f"{sigma:.4f}" for sigma in scheduler.sigmas[:-1])
    for text in (said, (out / "README.md").read_text()):
        assert re.search(rf"Trained: 1\.0000 0\.9000 0\.2000 0\.1000; stock diffusers uses {re.escape(instead)} ", text)
    exact = json.loads(re.search(r"ladder\.times (\[.*\])", said)[1])  # type: ignore[index]
    second = student_again(source, exact, tmp_path / "second")
    export(second, tmp_path / "out2")
    assert "warning" not in capsys.readouterr().err, "the times that it prints to copy are met"


def student_again(folder: Path, ladder: list[float], to: Path) -> Path:
    shutil.copytree(folder, to)
    recipe = json.loads((to / "recipe.json").read_text())
    (to / "recipe.json").write_text(json.dumps(recipe | {"ladder": ladder}))
    return to
