"""Run folders as training and evaluation leave them, small and made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.data.video_io import write_video
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.metrics import Row
from fastvideo.evaluation.report_store import save_measured
from fastvideo.evaluation.statistics import Estimate
from fastvideo.tests.evaluation.test_metrics import row

PROMPTS = ("a green seven", "a <b> digit", "an eight moving up")
SETTINGS = {"prompts": 512, "seed": 0, "split": "heldout", "reference_videos": 2048, "prompts_sha256": "f00"}


def moving_dots(rows: int, seed: int = 0, side: int = 32) -> Tensor:
    """``[rows, 3, 9, side, side]``: a bright square that moves over noise, so that frames differ."""
    videos = 0.1 * torch.rand(rows, 3, 9, side, side, generator=torch.Generator().manual_seed(seed)) - 1
    for frame in range(9):
        left = frame * (side - 8) // 8
        videos[:, :, frame, 8:16, left : left + 8] = 1.0
    return videos


def measured(student_frechet: float = 30.0, side: int = 32, **settings: object) -> Evaluation[Row]:
    """An evaluation with the demo's rows; only the student differs between runs."""
    near = Estimate(student_frechet, student_frechet - 5.0, student_frechet + 5.0, 512)
    guided = {"guidance": 2.0, "sampler": "euler", "kind": "teacher"}
    rows = {
        "teacher_50": row(network_calls=100, steps=50, denoise_seconds_per_video=0.25, **guided),
        "teacher_4": row(network_calls=8, **guided),
        "untrained_4": row(frechet=Estimate(200.0, 190.0, 215.0, 512), kind="untrained"),
        "student_4": row(frechet=near, kind="student"),
        "student_1": row(network_calls=1, steps=1, kind="student"),
    }
    videos = {name: moving_dots(len(PROMPTS), number, side) for number, name in enumerate(rows)}
    return Evaluation(rows, videos, PROMPTS, {**SETTINGS, **settings})


def make_run(folder: Path, evaluation: Evaluation[Any] | None = measured(), guidance: float = 2.0) -> Path:  # noqa: B008
    """A run of 400 steps with config, environment, curves and, if it was measured, figures and videos."""
    folder.mkdir(parents=True)
    config = f"distill_model: wan\ndistill_method: dmd2\noutput: {folder}\nmethod:\n  teacher_guidance: {guidance}\n"
    (folder / "config.yaml").write_text(config + "note: 'a < b'\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "revision": "0123456789abcdef" * 3}))
    lines = [
        {"step": s, "seconds": 0.1 * s, "critic/loss": guidance / s, "student/grad_norm": 1 + s % 7, **_validation(s)}
        for s in range(1, 401)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        save_measured(folder, evaluation, distillation={"wall_seconds": 240.0, "student_updates": 200})
    return folder


def _validation(step: int) -> dict[str, float]:
    if step % 100:
        return {}
    return {"validation/ema/frechet": 300.0 / step, "validation/student/frechet": 400.0 / step}


def without_figure(evaluation: Evaluation[Row], key: str) -> Evaluation[Row]:
    """The same evaluation with one figure undefined, as when no prompt names the attribute."""
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
    return replace(evaluation, rows={name: replace(r, **{key: nothing}) for name, r in evaluation.rows.items()})  # type: ignore[arg-type]


def add_validation(folder: Path, step: int = 400, motion: float = 0.5) -> Path:
    """Give a run a health check and videos of its last validation: motion at a share of the teacher's, and its band."""
    figures = {"contrast": 0.2, "red": 0.01, "green": 0.0, "blue": -0.01, "brightness": 0.5, "latent_mean": 0.0}
    teacher, student = {**figures, "motion": 0.1}, {**figures, "motion": 0.1 * motion}
    line = {"step": step, "alarms": [], "student": student, "training": {"update_balance": 8.0}, "teacher": teacher}
    (folder / "health.jsonl").write_text(json.dumps(line) + "\n")
    with (folder / "config.yaml").open("a") as file:
        file.write("health: {contrast: [0.5, 2.0], motion: [0.4, 2.5], update_balance: 0.5}\n")
    (folder / "validation").mkdir()
    strips = moving_dots(3, step, 64)
    for name, video in zip((f"step-{step:06d}-student", f"step-{step:06d}-x0", "teacher"), strips, strict=True):
        write_video(folder / "validation" / f"{name}.mp4", video)
    return folder
