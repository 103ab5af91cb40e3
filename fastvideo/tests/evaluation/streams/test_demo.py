"""The demo of streaming students, on a network with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastvideo.demo_stream import main
from fastvideo.errors import UserError
from fastvideo.tests.distillation.tiny import wan_folder

GOALS = {"teacher_digit", "student_digit_over_teacher", "frechet_over_untrained", "digit_drop", "switch_latency"}


@pytest.mark.slow
def test_three_trainings_and_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "demo"
    shutil.copytree(wan_folder(tmp_path / "wan"), teacher)
    reach = {"chunk": 1, "window": 6, "sink": 1, "positions": "window", "context_time": 0.0}
    size = {"height": 32, "width": 32, "num_frames": 33, "max_sequence_length": 16}
    recipe = {"sampler": "euler", "guidance": 1.5, "streaming": reach, "model": size}
    (teacher / "recipe.json").write_text(json.dumps(recipe))
    assert main(["--short", "--model", str(teacher), "--out", str(out), "--with-causvid", "--threads", "1"]) == 0
    found, long = (json.loads((folder / "metrics.json").read_text()) for folder in (out, out / "long"))
    assert found["goals"].keys() >= GOALS | {"exposure_bias_over_causvid", "vae_psnr", "vae_psnr_spread", "vae_digit"}
    assert found["distillation"]["demo_seconds"] > found["distillation"]["wall_seconds"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found["goals"]
    assert [found[name]["kind"] for name in ("teacher_2", "untrained_4", "student_4")] == [
        *("teacher", "untrained", "student")
    ]
    assert found["untrained_4"]["streaming"] == found["student_4"]["streaming"]
    assert found["self_forcing"]["samples"] == found["student_4"]["samples"]
    assert long["streaming_tuning"]["network_calls"] == 4
    for start, run in (("demo_causal_cd", tmp_path / "demo_self_forcing"), ("demo_self_forcing", out)):
        student = (tmp_path / start / "student").resolve()
        assert "threads: 1" in (run / "config.yaml").read_text()
        assert str(student) in (run / "config.yaml").read_text()  # each training goes on from the one before
    for page in (out / "report.html", out / "long" / "report.html"):
        assert "Right digit" in page.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "tiny"], "makes whole videos; a teacher whose recipe.json has `streaming`"),
        (["--model", "tiny", "--switches", "1"], "--switches: at least 2"),
        (["--model", "tiny", "--long", "9"], "too short to drift"),
    ],
)
def test_what_cannot_be_measured_is_not_trained(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*flags, "--out", str(tmp_path / "demo")])
    assert not list(tmp_path.iterdir())
