"""A training whose videos are streams draws their course at every validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.training.run import run

REACH = {"chunk": 2, "window": 4, "sink": 2}


def values_of(tmp_path: Path, method: str = "causal_sft", **validation: Any) -> dict[str, Any]:
    options = {"learning_rate": 0.001} | ({"reach": REACH} if method == "causal_sft" else {})
    return {
        "distill_model": "wan",
        "distill_method": method,
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(wan_folder(tmp_path)), "height": 32, "width": 32, "num_frames": 25}
        | {"max_sequence_length": 8},
        "roles": {"student": {"trainable": True}},
        "method": options,
        "data": {"path": "tiny_stream", "size": 4, "batch_size": 2, "cache": str(tmp_path / "cache")},
        "trainer": {"max_steps": 1},
        "validation": {"every": 1, "world_prompts": 2, **validation},
        "health": {"prompts": 2, "seeds": 2},
    }


@pytest.mark.slow
def test_validation_of_a_causal_student_beyond_the_length_of_its_training(tmp_path: Path) -> None:
    folder = run(validate(run_schema("wan", "causal_sft"), values_of(tmp_path, frames=41), "test")).parent
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    with av.open(str(folder / "validation" / "step-000001-student.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 41
    assert {"validation/student/digit_last", "validation/student/frechet_first", "health/late_motion"} <= names


@pytest.mark.parametrize(
    ("method", "frames", "message"),
    [
        ("sft", 41, r"validation\.frames: sft trains a model of whole videos"),
        ("causal_sft", 42, r"validation\.frames: 42 frames: one more than a multiple of 4"),
        ("causal_sft", 1, r"validation\.frames: reach.chunk: a video of 1 latent frames"),
        ("causal_sft", 17, "a stream of 17 frames is too short to drift"),
    ],
)
def test_other_lengths_are_refused_before_the_first_step(
    method: str, frames: int, message: str, tmp_path: Path
) -> None:
    config = validate(run_schema("wan", method), values_of(tmp_path, method, frames=frames), "test")
    with pytest.raises(UserError, match=message):
        run(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
