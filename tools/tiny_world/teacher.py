"""Train the tiny teacher with the `sft` method on latents of the world's real videos, through the command line."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel

from fastvideo.tiny.world import FRAMES, SIZE
from tools.tiny_world.pipeline import save_half
from tools.tiny_world.recipe import TextRecipe

CONFIG = Path(__file__).parents[2] / "examples" / "distillation" / "tiny_wan_sft.yaml"
GUIDANCE = 2.0  # the best of: fastvideo evaluate tiny --sweep-guidance 1,1.25,1.5,2,3

# Each further run starts from the previous averaged weights, with a fresh schedule and twice the batch.
FURTHER_RUNS = 2
FURTHER = {
    "--method.learning-rate": "1e-3",
    "--method.decay-steps": "9000",
    "--trainer.max-steps": "9000",
    "--data.batch-size": "128",
}


def train_teacher(out: Path) -> dict[str, float]:
    """Train the transformer in `out`/pipeline, keep all runs in `out`, install the result; returns its last loss."""
    runs = [out / f"teacher-{number}" for number in range(1, 2 + FURTHER_RUNS)]
    distil(CONFIG, out / "pipeline", runs[0], {})
    for before, run in itertools.pairwise(runs):
        distil(CONFIG, out / "pipeline", run, {**FURTHER, "--roles.student.path": str(before / "student")})
    install(runs[-1] / "student", out / "pipeline", sampling(GUIDANCE, TextRecipe()))
    return {"loss": last_loss(runs[-1])}


def last_loss(run: Path) -> float:
    """Loss of the last logged step of a run."""
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["student/loss"])


def distil(config: Path, pipeline: Path, output: Path, flags: dict[str, str]) -> None:
    """Run `fastvideo distill`."""
    flags = {"--config": str(config), "--model.path": str(pipeline), "--output": str(output), **flags}
    options = [part for item in flags.items() for part in item]
    options += ["--overwrite"] if (output / "config.yaml").is_file() else []
    subprocess.run([sys.executable, "-m", "fastvideo.training.distillation", *options], check=True)


def install(trained: Path, pipeline: Path, recipe: Mapping[str, Any]) -> None:
    """Put the transformer of a trained model folder into `pipeline`; see :func:`install_network`."""
    transformer = WanTransformer3DModel.from_pretrained(trained, subfolder="transformer", torch_dtype=torch.float32)
    install_network(transformer, pipeline, recipe)


def install_network(network: ModelMixin, pipeline: Path, recipe: Mapping[str, Any], part: str = "transformer") -> None:
    """Put a network into `pipeline` as its `part`, in half precision, with its sampling recipe."""
    save_half(network, pipeline / part)
    (pipeline / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def sampling(guidance: float, text: TextRecipe, frames: int = FRAMES) -> dict[str, Any]:
    """The recipe of a teacher.

    Args:
        guidance: the best one of a sweep.
        text: prompt length of the training, for copies of the folder.
        frames: of a video.
    """
    model = {"height": SIZE, "width": SIZE, "num_frames": frames, "max_sequence_length": text.max_length}
    return {"sampler": "euler", "guidance": guidance, "model": model}
