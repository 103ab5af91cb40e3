"""Whole evaluations of the shipped pipeline, a few prompts each."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastvideo.cli.evaluate import EvaluateArguments, row_specs, run_evaluate, table
from fastvideo.cli.generate import GenerateArguments, run_generate
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.evaluate import Evaluation, evaluate_rows
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.report_run import read_gallery
from fastvideo.evaluation.report_store import save_measured
from fastvideo.evaluation.rows import RowSpec, comparison_rows
from fastvideo.inference.loading import load_recipe
from fastvideo.tests.evaluation.test_metrics import ISSUE_KEYS
from fastvideo.tiny.paths import PIPELINE_FOLDER

LADDER = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped teacher with a student's recipe."""
    folder = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(PIPELINE_FOLDER, folder)
    recipe = {
        "ladder": LADDER,
        "sampler": "renoise",
        "guidance": 1.0,
        "steps": 7,
        "model": load_recipe("tiny")["model"],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return str(folder)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(12, seed=1, reference=256)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few reference videos behind the commands."""
    for module in ("evaluate", "sweep"):
        monkeypatch.setattr(f"fastvideo.evaluation.{module}.Judge", partial(Judge, reference=256))


@pytest.fixture(scope="module")
def evaluation(student: str, judge: Judge) -> Evaluation:
    rows = {
        "teacher_1": RowSpec("tiny", steps=1, guidance=1.5),
        "untrained_4": RowSpec("tiny", ladder=LADDER, kind="renoise"),
        "student_4": RowSpec(student),
    }
    return evaluate_rows(rows, judge=judge, keep_videos=3, batch_size=8)


def test_rows_have_every_promised_figure(evaluation: Evaluation) -> None:
    values = evaluation.to_dict()
    for name, calls in (("teacher_1", 2), ("untrained_4", 4), ("student_4", 4)):
        assert set(ISSUE_KEYS) <= set(values[name])
        assert values[name]["network_calls"] == calls
        assert values[name]["samples"] == 12
        assert values[name]["kind"] == name.split("_")[0]
        assert values[name]["denoise_seconds_per_video"] < values[name]["end_to_end_seconds_per_video"]
        assert 0 < values[name]["frechet_floor"] < values[name]["frechet"]


def test_same_weights_and_sampler_give_the_same_row(evaluation: Evaluation) -> None:
    """Prompts and noise are shared: a student equal to its teacher has the untrained row's figures."""
    torch.testing.assert_close(evaluation.videos["untrained_4"], evaluation.videos["student_4"])
    assert evaluation.rows["untrained_4"].frechet == evaluation.rows["student_4"].frechet
    assert evaluation.rows["untrained_4"].diversity == evaluation.rows["student_4"].diversity


def test_first_videos_and_their_prompts_are_kept(evaluation: Evaluation, judge: Judge) -> None:
    assert evaluation.prompts == judge.prompts[:3]
    assert evaluation.videos["student_4"].shape == (3, 3, 9, 32, 32)


def test_table_and_json(evaluation: Evaluation, tmp_path: Path) -> None:
    console = Console(width=160, record=True)
    console.print(table(evaluation.rows))
    text = console.export_text()
    assert all(name in text for name in evaluation.rows)
    save_measured(tmp_path / "out", evaluation, distillation={"wall_seconds": 1})
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert values["distillation"] == {"wall_seconds": 1}
    assert values["evaluation"]["prompts"] == 12


def test_comparison_has_the_six_rows(student: str) -> None:
    rows = comparison_rows("tiny", student)
    assert list(rows) == ["teacher_50", "teacher_4", "teacher_1", "untrained_4", "student_4", "student_1"]
    recipe = json.loads((Path(student) / "recipe.json").read_text(encoding="utf-8"))
    assert rows["untrained_4"] == RowSpec("tiny", ladder=LADDER, kind="renoise", like=recipe)


def test_the_untrained_row_has_the_sampler_of_the_student(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "recipe.json").write_text(json.dumps({"ladder": LADDER, "sampler": "euler"}))
    assert comparison_rows("tiny", str(tmp_path))["untrained_4"].kind == "euler"


def test_comparison_needs_a_student() -> None:
    with pytest.raises(UserError, match="not a student"):
        comparison_rows("tiny", "tiny")


@pytest.mark.usefixtures("quick")
def test_command_measures_folders(student: str, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    console = Console(width=160, record=True)
    run_evaluate(EvaluateArguments((f"{student}:1",), prompts=16, out=out), console)
    found = json.loads(out.read_text())
    assert found[f"{student}:1"]["network_calls"] == 1
    assert found["students"] == {f"{student}:1": {"folder": student, "steps": 7, "weights": None}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.usefixtures("quick")
def test_command_fills_a_folder_once(student: str, tmp_path: Path) -> None:
    arguments = EvaluateArguments((f"{student}:1",), prompts=16, out=tmp_path)
    run_evaluate(arguments, Console(width=160, record=True))
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures[f"{student}:1"]["kind"] == "student"
    assert {"seed", "prompts_sha256", "judge_sha256", "revision", "torch"} <= set(figures["evaluation"])
    found = read_gallery(tmp_path)
    assert found is not None
    assert [len(clips) for clips in found.rows.values()] == [len(found.prompts)] == [12]
    assert "Figures of Student, 1 step" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="holds figures already"):
        run_evaluate(arguments)


@pytest.mark.usefixtures("quick")
def test_sweep_names_every_scale() -> None:
    console = Console(width=160, record=True)
    run_evaluate(EvaluateArguments(("tiny:1",), prompts=8, sweep_guidance="1,1.5"), console)
    text = console.export_text()
    assert "8 training prompts" in text
    assert "1.5" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (EvaluateArguments(()), "at least one model folder"),
        (EvaluateArguments(("tiny:many",)), "'many' is not a number"),
        (EvaluateArguments(("tiny", "tiny")), "given twice"),
        (EvaluateArguments(("tiny",), sweep_guidance="1,two"), "two"),
        (EvaluateArguments(("./nowhere",)), "does not exist"),
        (EvaluateArguments(("tiny",), out=Path(__file__)), "this is a file"),
    ],
)
def test_bad_input_is_one_message(arguments: EvaluateArguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_evaluate(arguments)


def test_rows_are_named_as_given() -> None:
    assert row_specs(["tiny", "tiny:4"], 2.0) == {
        "tiny": RowSpec("tiny", guidance=2.0),
        "tiny:4": RowSpec("tiny", 4, 2.0),
    }


def test_generate_writes_the_video_that_the_seed_names(student: str, tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.apng" for name in ("first", "again", "other"))
    prompt = "a green seven moving up and left"
    line = run_generate(GenerateArguments(student, prompt, out=first, seed=3))
    assert "9 frames of 32x32, 4 steps (4 network calls)" in line
    run_generate(GenerateArguments(student, prompt, out=again, seed=3))
    run_generate(GenerateArguments(student, prompt, out=other, seed=4))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_generate_refuses_a_long_prompt_and_writes_nothing(student: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokens"):
        run_generate(GenerateArguments(student, "a seven " * 40, out=tmp_path / "seven.mp4"))
    assert not list(tmp_path.iterdir())
