"""``fastvideo evaluate --teacher``: from prompts to a page, sampled once."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastvideo.cli.evaluate import EvaluateArguments, run_evaluate
from fastvideo.data.video_io import write_video
from fastvideo.errors import UserError
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.samples import KEY, Clips, Samples
from fastvideo.inference.loading import load_recipe
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import TinyWorld

TEXTS = ("a green seven moving up", "a red digit", "a three", "a blue one moving left", "an eight", "a white nine")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def evaluate(*folders: str, **options: Any) -> str:
    """The output of ``fastvideo evaluate`` against the tiny teacher at two steps."""
    console = Console(width=200, record=True)
    if isinstance(options.get("prompts"), Path):
        options["prompts"] = str(options["prompts"])
    run_evaluate(EvaluateArguments(folders, **{"teacher": "tiny:2", "batch_size": 16, **options}), console)
    return console.export_text()


def figures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_measures_any_prompts_and_samples_once(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    text = evaluate("tiny:1", prompts=prompts, out=out)
    rows = figures(out)
    assert "48 videos sampled" in text
    assert "not measured: clip_score: give --clip" in text
    assert rows["tiny:2"]["motion"] == rows["tiny:2"]["seed_diversity"] == 1.0
    assert rows["tiny:2"]["fd_teacher"] == rows["tiny:2"]["fd_teacher_floor"]
    assert rows["tiny:1"]["counts"]["prompt_match"] == 6
    low, high = rows["tiny:1"]["intervals"]["sharpness"]
    assert low < rows["tiny:1"]["sharpness"] < high < 1
    page = (out / "report.html").read_text()
    assert "Against the teacher" in page
    assert "prompts found" in page

    text = evaluate("tiny:1", prompts=prompts, out=out)
    assert "0 videos sampled" in text
    assert "48 reused" in text
    again = figures(out)
    assert {k: v for k, v in again["tiny:1"].items() if "seconds" not in k} == {
        k: v for k, v in rows["tiny:1"].items() if "seconds" not in k
    }


def test_a_family_of_stills_is_measured_without_motion_and_flicker(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    options = {"teacher": "tiny_stills:2", "prompts": prompts, "out": out}
    for name, frames in (("motion", 2), ("flicker", 3)):
        reason = f"it compares {frames} frames, and a sample here is a still"
        with pytest.raises(UserError, match=f"--metrics {name}: {reason}"):
            evaluate("tiny_stills:1", **options, metrics=(name,))
    assert not out.exists()
    text = evaluate("tiny_stills:1", **options)
    assert "not measured: motion: it compares 2 frames, and a sample here is a still" in text
    assert "not measured: flicker: it compares 3 frames" in text
    assert "sharpness, saturation, seed diversity: 1 is the teacher's" in text
    found = figures(out)
    row = found["tiny_stills:1"]
    assert {"sharpness", "saturation", "seed_diversity", "fd_teacher", "prompt_match"} <= set(row)
    assert not {"motion", "motion_distance", "flicker"} & {
        *row,
        *row["intervals"],
        *found["evaluation"]["metrics"].split(", "),
    }
    page = (out / "report.html").read_text()
    assert "Against the teacher" in page
    assert ">sharpness" in page
    assert ">motion" not in page
    assert "Stills have neither motion nor flicker" in page


def test_the_tiny_world_gives_prompts_for_samples_whose_truth_it_does_not_know(tmp_path: Path) -> None:
    out = tmp_path / "measured"
    text = evaluate(teacher="tiny_stills:1", prompts=3, out=out, metrics=("sharpness",))
    assert "not measured: the tiny world's truth: it knows videos of 9 frames of 32x32, and this model makes 1" in text
    assert set(figures(out)["tiny_stills:1"]["intervals"]) == {"sharpness"}


def test_continues_with_more_prompts_and_after_a_damaged_sample(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    options = {"metrics": ("motion",), "out": out, "prompts": prompts}
    evaluate(**options)
    with prompts.open("a") as file:
        file.write("a magenta two\n")
    assert "1 video sampled" in evaluate(**options)
    damaged = next((out / "samples").rglob("*.safetensors"))
    damaged.write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be read .* delete it"):
        evaluate(**options)
    damaged.unlink()
    assert "1 video sampled" in evaluate(**options)


def test_shares_are_sampled_apart_and_measured_together(prompts: Path, tmp_path: Path) -> None:
    apart, whole = tmp_path / "apart", tmp_path / "whole"
    for share in ("1/2", "2/2"):
        assert "3 videos sampled" in evaluate(prompts=prompts, out=apart, share=share, metrics=("motion",))
        assert not (apart / "metrics.json").exists()
    evaluate(prompts=prompts, out=apart, metrics=("motion",))
    evaluate(prompts=prompts, out=whole, metrics=("motion",))
    files = [sorted((out / "samples").rglob("*.safetensors")) for out in (apart, whole)]
    for one, other in zip(*files, strict=True):
        assert one.name == other.name
        torch.testing.assert_close(load_file(one), load_file(other))


def test_another_sampler_or_other_weights_are_other_samples(prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(PIPELINE_FOLDER, model)
    options = {"prompts": prompts, "out": tmp_path / "out", "metrics": ("motion",)}
    assert "6 videos sampled" in evaluate(teacher=f"{model}:2", **options)
    assert "0 videos sampled" in evaluate(teacher=f"{model}:2", **options)
    weights = next((model / "transformer").glob("*.safetensors"))
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights)
    assert "6 videos sampled" in evaluate(teacher=f"{model}:2", **options)
    (model / "recipe.json").write_text(json.dumps({**load_recipe("tiny"), "steps": 9, "weights": "ema"}))
    assert "6 videos sampled" in evaluate(teacher=f"{model}:3", **options)
    trained = {"folder": str(model), "steps": 9, "weights": "ema"}
    assert figures(tmp_path / "out")["students"] == {f"{model}:3": trained}


def test_another_precision_is_other_samples_and_so_is_bfloat16_under_autocast(prompts: Path, tmp_path: Path) -> None:
    """Those of networks with float32 weights under autocast lie in a folder of the precision's name alone."""
    options = {"prompts": prompts, "out": tmp_path / "out", "metrics": ("motion",)}
    assert "6 videos sampled" in evaluate(**options)
    (whole,) = (tmp_path / "out" / "samples").iterdir()
    earlier = Samples(whole.parent, {**json.loads((whole / KEY).read_text()), "precision": "bfloat16"}, Clips((), 0))
    shutil.copytree(whole, earlier.folder)
    assert "6 videos sampled" in evaluate(**options, precision="bfloat16")
    assert "6 reused" in evaluate(**options, precision="bfloat16")
    assert "6 reused" in evaluate(**options)


@pytest.mark.slow
def test_the_tiny_worlds_truth_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvideo.evaluation.judge.Judge", partial(Judge, reference=256))
    out = tmp_path / "measured"
    evaluate("tiny:1", prompts=12, out=out)
    row = figures(out)["tiny:1"]
    assert {"frechet", "frechet_floor", "digit_accuracy", "diversity", "fd_teacher", "prompt_match"} <= set(row)
    page = (out / "report.html").read_text()
    assert "Against the teacher" in page
    assert "Was it worth it?" not in page  # two teachers, no student
    assert "Real videos through the VAE" in page


def test_the_users_own_data(prompts: Path, tmp_path: Path) -> None:
    """The folder's videos and the dataset made of them are the same data."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, video in enumerate(TinyWorld("train").sample(6, 0).videos):
        write_video(folder / f"{number}.mp4", video)
    out = tmp_path / "out"
    evaluate(prompts=prompts, out=out, metrics=("fd_teacher",), data=folder)
    found = figures(out)
    assert found["evaluation"]["data_videos"] == 6
    assert found["tiny:2"]["fd_data"] > 0
    assert found["tiny:2"]["intervals"]["fd_data"][0] <= found["tiny:2"]["fd_data"]


def test_report_of_two_measurements(prompts: Path, tmp_path: Path) -> None:
    for name, model in (("a", "tiny:1"), ("b", "tiny:3")):
        evaluate(model, prompts=prompts, out=tmp_path / name, metrics=("prompt_match", "motion", "seed_diversity"))
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "compare.html").read_text()
    assert "Against the teacher" in page
    assert "measured on different prompts" not in page


def student_of_another_size(folder: Path) -> Path:
    """The shipped teacher as a student of wider videos."""
    shutil.copytree(PIPELINE_FOLDER, folder)
    recipe = load_recipe("tiny")
    recipe = {**recipe, "model": {**recipe["model"], "width": 64}, "ladder": [1.0, 0.5]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def test_another_latent_shape_is_one_message_before_anything_is_sampled(prompts: Path, tmp_path: Path) -> None:
    wide = student_of_another_size(tmp_path / "wide")
    with pytest.raises(UserError, match=r"wide makes latents \(16, 3, 4, 8\) .* makes \(16, 3, 4, 4\)"):
        evaluate(str(wide), prompts=prompts, out=tmp_path / "out")
    with pytest.raises(UserError, match="have different VAEs"):
        evaluate("tiny_cogvideox:1", prompts=prompts, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("promptmatch",)}, "unknown 'promptmatch'; did you mean 'prompt_match'"),
        ({"metrics": ("motion", "motion")}, "motion is given twice"),
        ({"metrics": ("clip_score",)}, "give --clip PATH"),
        ({"metrics": ("fvd",)}, "give --fvd-extractor FILE"),
        (
            {"metrics": ("vbench_dynamic_degree",)},
            "vbench is missing: pip install --no-deps vbench && pip install decord",
        ),
        ({"clip": "/nowhere"}, "--clip /nowhere: a CLIP model"),
        ({"fvd_extractor": Path("/nowhere.pt")}, "--fvd-extractor /nowhere.pt: a TorchScript module"),
        ({"out": None}, "needs --out FOLDER"),
        ({"out": Path("a.json")}, "needs --out FOLDER"),
        ({"share": "0/4"}, "--share 0/4: I/N is expected"),
        ({"share": "5/4"}, "--share 5/4: I/N is expected"),
        ({"prompts": Path("/nowhere.txt")}, "No such file or directory"),
        ({"prompts": 1}, "at least 2 prompts"),
        ({"teacher": "tiny:many"}, "'many' is not a number"),
        ({"data": Path("/nowhere")}, "--data /nowhere does not exist"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sampled(
    prompts: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        evaluate("tiny:1", **{"prompts": prompts, "out": out, **options})
    assert not out.exists()


def test_options_of_a_teacher_need_one() -> None:
    with pytest.raises(UserError, match="--metrics needs --teacher"):
        run_evaluate(EvaluateArguments(("tiny:1",), metrics=("motion",)))
    with pytest.raises(UserError, match="without --teacher the tiny world measures"):
        run_evaluate(EvaluateArguments(("tiny:1",), prompts="prompts.txt"))


def test_figures_of_another_kind_are_kept(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"evaluation": {"split": "heldout"}}')
    with pytest.raises(UserError, match="holds figures already"):
        evaluate(prompts=prompts, out=tmp_path)
