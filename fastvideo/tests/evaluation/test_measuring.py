"""A model whose videos a judge does not know is refused before anything is sampled, with the way to measure it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvideo.cli.evaluate import EvaluateArguments, run_evaluate
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.measuring import check_validated, measuring_command, video_shape
from fastvideo.evaluation.report_run import Run
from fastvideo.inference.loading import open_model
from fastvideo.tests.distillation.tiny import made_family, wan_folder


@pytest.mark.parametrize("sweep", [None, "1,2"])
def test_a_model_of_streams_is_sent_to_long(sweep: str | None) -> None:
    with pytest.raises(UserError, match=r"tiny_stream\S* makes 33 frames of 32x32: measure it with --long 33"):
        run_evaluate(EvaluateArguments(("tiny_stream:1",), prompts=8, sweep_guidance=sweep))


def test_a_model_of_another_size_is_sent_to_its_teacher(tmp_path: Path) -> None:
    folder = str(wan_folder(tmp_path))
    sizes = {"height": 64, "width": 48, "num_frames": 9, "max_sequence_length": 8}
    (Path(folder) / "recipe.json").write_text(json.dumps({"model": sizes}))
    with pytest.raises(UserError, match=r"makes 9 frames of 64x48: let its teacher judge, with --teacher"):
        run_evaluate(EvaluateArguments((folder,), prompts=8))
    with pytest.raises(UserError, match=r"streams are measured on the tiny world, .* makes 64x48"):
        run_evaluate(EvaluateArguments((folder,), prompts=8, long=33))
    with pytest.raises(UserError, match=r"validation\.world_prompts: .* give validation\.prompts"):
        check_validated(open_model(folder).adapter)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ({"path": "tiny", "num_frames": 9}, ""),
        ({"path": "tiny_stream", "num_frames": 33}, " --long 33"),
        ({"path": "Wan-AI/Wan2.1", "num_frames": 81}, " --teacher Wan-AI/Wan2.1 --prompts prompts.txt"),
    ],
)
def test_a_page_prints_the_command_that_fits_the_run(model: dict[str, object], flags: str) -> None:
    assert measuring_command("student", model) == f"fastvideo evaluate student{flags}"
    run = Run("mine", Path("out/my run"), config=f"model: {model}")
    assert run.measuring == f"fastvideo evaluate 'out/my run/student'{flags} --out 'out/my run'"


def test_a_state_of_several_parts_has_the_frames_of_its_video(tmp_path: Path) -> None:
    adapter = made_family("ltx2", tmp_path)
    assert adapter.codec.latent_shape[1] == 1
    assert video_shape(adapter) == (adapter.config.num_frames, adapter.config.height, adapter.config.width)
    assert video_shape(adapter)[0] > 2
