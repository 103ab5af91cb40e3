"""Validation's videos: those of ``fastvideo generate``, and the same on one process or several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvideo.data.video_io as video_io
import fastvideo.training.validation as validation
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.validation import ValidationSinks
from fastvideo.distillation.registry import run_schema
from fastvideo.inference.generate import generate_video
from fastvideo.inference.loading import load_model
from fastvideo.tests.launch import in_world
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up and left", "a red three"]
SEED = 11


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS * 2))
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "roles": {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")},
        "method": {"student_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "generator_update_interval": 1},
        "ladder": {"times": [1.0, 0.5]},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 2, "log_every": 1},
        "validation": {"every": 2, "prompts": PROMPTS, "seed": SEED},
        "health": {"enabled": False},
    }


@pytest.mark.parametrize("averaged", [False, True], ids=["student", "ema"])
def test_generate_gives_the_video_of_the_validation(
    averaged: bool, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last validation and the saved student: the same bits for each prompt and seed, and others for another."""
    written: dict[str, Tensor] = {}
    monkeypatch.setattr(video_io, "write_video", lambda path, video, *_, **__: written.update({path.name: video}))
    values["ema"] = {"enabled": averaged, "decay": 0.5, "start_step": 0}
    model = load_model(str(run(validate(run_schema("wan", "dmd2"), values, "test"))))
    row = written[f"step-000002-{'ema' if averaged else 'student'}.mp4"]
    shown = row.split(row.shape[-1] // len(PROMPTS), dim=-1)
    for prompt, video in zip(PROMPTS, shown, strict=True):
        made = generate_video(model, prompt, model.sampler(), SEED)
        assert torch.equal(made, video.clamp(-1, 1))
        assert not torch.equal(made, generate_video(model, prompt, model.sampler(), SEED + 1))
    if averaged:
        assert not torch.equal(row, written["step-000002-student.mp4"])


def validated(values: dict[str, Any], rank: int, size: int, shard: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Videos by file name and metrics of one validation, as a process of ``size`` has them."""
    processes = Processes(rank, size, shard=shard)
    parallel = {"shard": shard}
    config = validate(run_schema("wan", "dmd2"), values | {"parallel": parallel}, "test")
    adapter = build_adapter(config, processes)
    method, tracker = build_method(config, adapter, processes), Tracker(Path(config.output), enabled=processes.is_main)
    hook = validation.build_validation(config, adapter, method, tracker, processes)
    assert hook.sinks is not None
    videos: dict[str, Tensor] = {}
    metrics: dict[str, Any] = {}

    def write(path: Path, video: Tensor) -> None:
        videos[path.name] = video

    def log(found: Any, step: int) -> None:
        metrics.update(found)

    hook.sinks = ValidationSinks(log, write, hook.sinks.score, hook.sinks.health)
    hook.run(2)
    return videos, metrics


@pytest.mark.parametrize("shard", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_share_a_validation(
    shard: int, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts, so that one is sampled twice and counted once; the main process alone has results."""
    monkeypatch.setattr(validation, "VALIDATION_REFERENCE", 64)
    values["validation"] = {"every": 2, "world_prompts": 3, "batch_size": 1, "seed": SEED}
    values["health"] = {"prompts": 1, "seeds": 3, "teacher_steps": 2}
    (tmp_path / "run").mkdir()
    (alone,) = in_world(1, partial(validated, values), tmp_path / "one")
    (tmp_path / "run" / "validation" / "reference.json").unlink()
    main, other = in_world(2, partial(validated, values, shard=shard), tmp_path / "two")
    assert other == ({}, {})
    assert {name.partition("/")[0] for name in main[1]} == {"validation", "health"}
    assert main[1] == pytest.approx(alone[1], rel=0, abs=0, nan_ok=True)
    assert main[0].keys() == alone[0].keys() == {"step-000002-student.mp4"}
    assert all(torch.equal(video, alone[0][name]) for name, video in main[0].items())
