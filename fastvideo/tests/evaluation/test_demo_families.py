"""The demo of a frame teacher beside a video teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fastvideo.demo_families import ARMS, arm_values, main
from fastvideo.errors import UserError


@pytest.mark.slow
def test_arms_are_trained_and_measured_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["--short", "--out", str(out), "--arms", "video", "shuffled"]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found["goals"]
    assert found["goals"].keys() == {"video_digit", "still_student_digit_over_teacher"}
    families = found["families"]
    assert families["arms"].keys() == {"teacher_4", "untrained_4", "video_0", "shuffled_0"}
    assert families["trial"]["train"]["frames"] == found["video_0"]["samples"] == 48
    trained = yaml.safe_load((out / "shuffled_0" / "config.yaml").read_text())
    assert trained["roles"]["frame_teacher"]["model"]["path"] == str((out / "shuffled_words").resolve())
    logged = [json.loads(line) for line in (out / "shuffled_0" / "metrics.jsonl").read_text().splitlines()]
    assert any("student/frame_gradient" in line for line in logged)
    assert "models side by side" in (out / "report.html").read_text()


def test_the_arm_without_a_frame_teacher_is_the_same_recipe_of_plain_dmd2(tmp_path: Path) -> None:
    video, frames = (arm_values(ARMS[name], tmp_path) for name in ("video", "frames"))
    assert video["distill_method"] == "dmd2"
    assert set(frames["roles"]) - set(video["roles"]) == {"frame_teacher", "frame_critic"}
    assert video["method"].items() <= frames["method"].items()
    assert {name for name in frames["method"] if name not in video["method"]} == {
        *("frame_weight", "frame_time_range", "frame_guidance", "frame_videos", "frames_per_video"),
        *("frame_critic_learning_rate", "frame_warmup_steps", "trust_frame_teacher"),
    }
    assert {name: value for name, value in video.items() if name not in ("distill_method", "roles", "method")} == {
        name: value for name, value in frames.items() if name not in ("distill_method", "roles", "method")
    }


@pytest.mark.parametrize("flags", [["--arms", "vidoe"], ["--arms"], ["--seeds"]])
def test_what_is_no_arm_is_refused(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match="one or more of video, frames, all_noise, frames_only, shuffled"):
        main([*flags, "--out", str(tmp_path / "demo")])
