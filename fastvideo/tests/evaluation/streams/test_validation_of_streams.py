"""A training whose videos are streams draws their course at every validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.training.run import run


@pytest.mark.slow
def test_validation_of_a_causal_student(tmp_path: Path) -> None:
    values = {
        "distill_model": "wan",
        "distill_method": "causal_sft",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(wan_folder(tmp_path)), "height": 32, "width": 32, "num_frames": 25},
        "roles": {"student": {"trainable": True}},
        "method": {"learning_rate": 0.001, "reach": {"chunk": 1, "window": 2, "sink": 1}},
        "data": {"path": "tiny_stream", "size": 4, "batch_size": 2, "cache": str(tmp_path / "cache")},
        "trainer": {"max_steps": 1},
        "validation": {"every": 1, "world_prompts": 2},
        "health": {"prompts": 2, "seeds": 2},
    }
    values["model"]["max_sequence_length"] = 8  # type: ignore[index]
    folder = run(validate(run_schema("wan", "causal_sft"), values, "test")).parent
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    assert {"validation/student/digit_last", "validation/student/frechet_first", "health/late_motion"} <= names
