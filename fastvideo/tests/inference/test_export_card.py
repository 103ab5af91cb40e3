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
from safetensors import safe_open

from fastvideo.cli import main
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.inference.licences import licence_of, other_models
from fastvideo.tests.distillation.tiny import wan_config, wan_folder
from fastvideo.tests.inference.exporting import PROMPTS, export
from fastvideo.training.run import run


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


AFTER = "of training, and this student is the"


@pytest.mark.parametrize(
    ("trained", "flags", "said", "shown"),
    [
        ({"folder": "student"}, [], "", True),
        ({"folder": "student"}, ["--live"], f"averaged weights after 2 steps {AFTER} last weights after 2", False),
        (
            {"folder": "student", "steps": 1},
            [],
            f"averaged weights after 1 step {AFTER} averaged weights after 2",
            False,
        ),
        ({"folder": "../other"}, [], "are of other models, and this student is the averaged weights", False),
        (None, [], "metrics.json names no step, as an earlier version wrote it", True),
    ],
    ids=["own", "live", "earlier", "other", "unnamed"],
)
def test_figures_of_another_student_are_not_on_the_card(
    trained: dict[str, Any] | None, flags: list[str], said: str, shown: bool, distilled: Path, tmp_path: Path
) -> None:
    measured = Path(shutil.copytree(distilled, tmp_path / "run"))
    students = {} if trained is None else {"students": {"student_4": {"steps": 2, "weights": "ema", **trained}}}
    figures = {"student_4": {"network_calls": 4, "frechet": 11.25}, **students}
    (measured / "metrics.json").write_text(json.dumps(figures))
    card = (export(measured, tmp_path / "out", *flags) / "README.md").read_text()
    assert said in card
    assert ("this student" in card) == bool(said)
    assert ("| frechet | 11.25 |" in card) == shown


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


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter under a teacher of its own licence, and a critic whose card nobody has."""
    root = tmp_path_factory.mktemp("taught")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    base, teacher, critic = wan_folder(root / "own"), root / "someones-model", root / "nameless"
    for copy in (teacher, critic):
        shutil.copytree(base, copy)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: dev-only\nlicense_link: LICENSE.md\n---\n")
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "device": "cpu",
        "model": wan_config(base).model_dump(),
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 2}},
            "teacher": {"trainable": False, "path": str(teacher)},
            "critic": {"trainable": True, "path": str(critic)},
        },
        "ladder": {"times": [1.0, 0.5]},
        "method": {"generator_update_interval": 1},
        "data": {"prompts": str(root / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 1},
    }
    return run(validate(run_schema("wan", "dmd2"), values, "test"))


@pytest.mark.parametrize("moved", [False, True], ids=["in its run", "alone"])
def test_the_teachers_licences_are_passed_on(taught: Path, tmp_path: Path, moved: bool) -> None:
    source = Path(shutil.copytree(taught, tmp_path / "alone")) if moved else taught
    _, front, body = (export(source, tmp_path / "out") / "README.md").read_text().split("---\n", 2)
    named = yaml.safe_load(front)
    assert (named["license"], named["license_name"]) == ("other", "apache-2.0-and-dev-only-and-unknown")
    assert "base model's licence applies to it: apache-2.0." in body
    assert "* `someones-model`: other, dev-only, LICENSE.md\n" in body
    assert "* `nameless`: not known here" in body


def test_an_adapters_header_names_all_licences(taught: Path, tmp_path: Path) -> None:
    assert main(["export", str(taught.parent), "--to", "lora-diffusers", "--out", str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        named = file.metadata()["license"]
    assert named.endswith(": apache-2.0; someones-model: dev-only; nameless: unknown")
    assert "* `someones-model`: other, dev-only, LICENSE.md\n" in (tmp_path / "out" / "README.md").read_text()


def test_models_of_other_families_and_of_earlier_runs_are_named_once(taught: Path, tmp_path: Path) -> None:
    theirs = {"family": "cogvideox", "path": "tiny_cogvideox"}
    roles = {"teacher": {"trainable": False, "model": theirs}, "critic": {"trainable": True, "model": theirs}}
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "method": {},
        "roles": {"student": {"trainable": True, "path": str(taught)}, **roles},
    }
    found = other_models(validate(run_schema("wan", "dmd2"), values, "test"))
    assert [(model["name"], model.get("license")) for model in found] == [
        ("student", "apache-2.0"),
        ("someones-model", "other"),
        ("nameless", None),
        ("tiny_cogvideox", "apache-2.0"),
    ]


def test_a_card_on_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--someone--a-model"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of("someone/a-model") == {"license": "mit"}
    assert licence_of("someone/another") == {}


def test_a_student_whose_recipe_names_no_models_says_so(student: Callable[..., Path], tmp_path: Path) -> None:
    source = student()
    recipe = json.loads((source / "recipe.json").read_text())
    del recipe["other_models"]
    (source / "recipe.json").write_text(json.dumps(recipe))
    assert "does not say which other models" in (export(source, tmp_path / "out") / "README.md").read_text()


def test_a_card_that_is_no_text_leaves_the_licence_unknown(tmp_path: Path) -> None:
    """It is read when the result is written: nothing may be lost by it."""
    (tmp_path / "README.md").write_bytes(b"---\nlicense: [\xff\xfe\n---\n")
    assert licence_of(str(tmp_path)) == {}
