"""Validation on the real tiny model: it writes what it promises and leaves the training alone, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up and left", "a red three", "a digit"]
SHORT = {"prompts": 1, "seeds": 1, "teacher_steps": 2}
"""A look at the health that takes a moment."""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS * 2))
    trained = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "plain"),
        "model": {"path": "tiny"},
        "roles": trained,
        "method": {"teacher_guidance": 1.5, "student_learning_rate": 1e-4, "critic_learning_rate": 1e-4},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 4, "log_every": 1},
    }


def trained(values: dict[str, Any], **changes: Any) -> Path:
    return run(validate(run_schema("wan", "dmd2"), values | changes, "test"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_trajectory_is_the_same_with_and_without_validation(values: dict[str, Any], tmp_path: Path) -> None:
    plain = trained(values)
    watched = trained(values, output=str(tmp_path / "watched"), validation={"every": 2, "prompts": PROMPTS})
    weights = [load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (plain, watched)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [[m for m in metrics(folder.parent) if "student/loss" in m] for folder in (plain, watched)]
    for first, second in zip(*lines, strict=True):
        first.pop("seconds"), second.pop("seconds")
        assert first == second


def test_validation_writes_videos_of_live_and_averaged_weights(values: dict[str, Any], tmp_path: Path) -> None:
    trained(values, validation={"every": 2, "prompts": PROMPTS}, health=SHORT)
    written = sorted(file.name for file in (tmp_path / "plain" / "validation").iterdir())
    looked_at = [f"step-00000{step}-{name}.mp4" for step in (2, 4) for name in ("ema", "student", "x0")]
    assert written == ["reference.json", *looked_at, "teacher.mp4"]


@pytest.mark.parametrize(
    ("weights", "averaged", "names"),
    [("ema", True, ["ema"]), ("ema", False, ["student"]), ("live", True, ["student"])],
)
def test_validation_shows_the_weights_asked_for_and_no_panel_unless_asked(
    weights: str, averaged: bool, names: list[str], values: dict[str, Any], tmp_path: Path
) -> None:
    watched = {"every": 4, "prompts": PROMPTS[:1], "weights": weights}
    trained(values, validation=watched, health=SHORT | {"panels": False}, ema={"enabled": averaged})
    written = sorted(file.name for file in (tmp_path / "plain" / "validation").glob("step-*"))
    assert written == [f"step-000004-{name}.mp4" for name in names]


@pytest.mark.slow
def test_health_is_looked_at_in_every_validation(values: dict[str, Any], tmp_path: Path) -> None:
    """The teacher's videos are made once; the same bits come out again after a resume."""
    health = {"prompts": 2, "teacher_steps": 3}
    changes = {"validation": {"every": 2, "prompts": PROMPTS}, "health": health, "checkpoint": {"every": 2}}
    trained(values, **changes)
    folder = tmp_path / "plain"
    lines = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"contrast", "motion", "diversity", "grid", "latent_std"} <= lines[0]["student"].keys() & lines[0]["teacher"]
    assert {"update_balance", "dmd_gradient_rms", "student_movement"} <= lines[0]["training"].keys()
    assert lines[0]["teacher"] == lines[1]["teacher"]
    logged = next(line for line in metrics(folder) if "health/motion" in line)
    assert logged["health/motion"] == lines[0]["student"]["motion"]
    for name in ("checkpoints/step-4", "student"):
        shutil.rmtree(folder / name)
    run(validate(run_schema("wan", "dmd2"), values | changes, "test"), resume=True)
    assert [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()] == lines


def test_a_run_without_a_teacher_is_compared_with_the_tiny_world(values: dict[str, Any], tmp_path: Path) -> None:
    changes = {"distill_method": "sft", "method": {}, "roles": {"student": {"trainable": True}}, "ladder": {"count": 2}}
    changes["data"] = {"size": 64, "batch_size": 2, "cache": str(tmp_path / "cache")}
    changes |= {"validation": {"every": 4, "prompts": PROMPTS}, "health": {"prompts": 2}}
    run(validate(run_schema("wan", "sft"), values | changes, "test"))
    (line,) = [json.loads(line) for line in (tmp_path / "plain" / "health.jsonl").read_text().splitlines()]
    assert "diversity" in line["student"]
    assert line["real"]["contrast"] > 0.05


@pytest.mark.slow
def test_fifty_steps_with_and_without_validation_and_health_end_in_the_same_bits(
    values: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"trainer": {"max_steps": 50, "log_every": 10}}
    watched = {"validation": {"every": 10, "world_prompts": 4}, "output": str(tmp_path / "watched")}
    folders, states = [], []
    for own in ({}, watched):
        torch.manual_seed(0)
        folders.append(trained(values, **changes, **own))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "networks may draw from torch's own random numbers, such as dropout"
    first, second = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((tmp_path / "watched" / "health.jsonl").read_text().splitlines()) == 5


def test_validation_on_the_tiny_world_is_scored(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvideo.training.validation.VALIDATION_REFERENCE", 64)
    trained(values, validation={"every": 4, "world_prompts": 4}, health=SHORT)
    scored = next(line for line in metrics(tmp_path / "plain") if "validation/ema/frechet" in line)
    assert scored["step"] == 4
    assert 0.0 <= scored["validation/student/digit_accuracy"] <= 1.0


def test_validation_without_prompts_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"validation: `every` is set: give `prompts`"):
        trained(values, validation={"every": 2})
    assert not Path(values["output"]).exists()


def test_the_result_is_a_pipeline_that_stock_diffusers_loads(values: dict[str, Any]) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(trained(values))
    options = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "np"}
    video = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, **options).frames
    assert video.shape == (1, 9, 32, 32, 3)


def test_a_tuned_teacher_keeps_the_guidance_of_its_source(values: dict[str, Any], tmp_path: Path) -> None:
    from fastvideo.inference.loading import load_model

    data = {"size": 4, "batch_size": 2, "cache": str(tmp_path / "cache")}
    changes = {"distill_method": "sft", "method": {}, "roles": {"student": {"trainable": True}}, "data": data}
    folder = run(validate(run_schema("wan", "sft"), values | changes, "test"))
    tuned, source = load_model(str(folder)), load_model("tiny")
    assert not tuned.is_student
    assert tuned.sampler() == source.sampler()
