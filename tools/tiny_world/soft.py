"""The teacher of the soft world: the shipped Wan network, tuned on videos of half the resolution."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fastvideo.tiny.paths import PIPELINE_FOLDER
from tools.tiny_world import teacher
from tools.tiny_world.recipe import TextRecipe


@dataclass(frozen=True)
class SoftRecipe:
    """Tuning of the network by the `sft` method, on top of its own recipe.

    Attributes:
        videos, steps, learning_rate: of the training.
    """

    videos: int = 8192
    steps: int = 600
    learning_rate: float = 6e-4


def network_stage(out: Path, recipe: SoftRecipe) -> dict[str, float]:
    """Copy the shipped pipeline, whose network knows captions and motion already."""
    shutil.copytree(PIPELINE_FOLDER, out / "pipeline", dirs_exist_ok=True)
    return {}


def teacher_stage(out: Path, recipe: SoftRecipe) -> dict[str, float]:
    """Tune the network on soft videos and install it; returns its last loss."""
    run = out / "teacher"
    flags = {
        "--data.path": "tiny_soft",
        "--data.size": str(recipe.videos),
        "--method.learning-rate": str(recipe.learning_rate),
        "--method.warmup-steps": "30",
        "--method.decay-steps": str(recipe.steps),
        "--trainer.max-steps": str(recipe.steps),
        "--ema.decay": "0.98",
        "--ema.start-step": "50",
        "--checkpoint.every": str(recipe.steps),
    }
    teacher.distil(teacher.CONFIG, out / "pipeline", run, flags)
    teacher.install(run / "student", out / "pipeline", teacher.sampling(teacher.GUIDANCE, TextRecipe()))
    return {"loss": teacher.last_loss(run)}
