"""A tiny teacher: the `sft` method on the latents of the world's real videos, started as a user would start it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

from fastvideo.tiny.pipeline import save_half
from fastvideo.tiny.recipe import TextRecipe
from fastvideo.tiny.world import FRAMES, SIZE

CONFIG = Path("examples/distillation/tiny_wan_sft.yaml")
GUIDANCE = 2.0  # the best of: fastvideo evaluate tiny --sweep-guidance 1,1.25,1.5,2,3
COGVIDEOX_GUIDANCE = 2.0
# What the transformer was trained on, so that a copy of the folder is sampled like the folder itself.
MODEL = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "max_sequence_length": TextRecipe().max_length}

# Each further run starts from the averaged weights of the one before, with a fresh schedule and twice the batch.
FURTHER_RUNS = 2
FURTHER = {
    "--method.learning-rate": "1e-3",
    "--method.decay-steps": "9000",
    "--trainer.max-steps": "9000",
    "--data.batch-size": "128",
}


@dataclass(frozen=True)
class TeacherRecipe:
    """How one family's teacher is made.

    Attributes:
        config: of the first run; further ones have `FURTHER` over it.
        network: class of the transformer.
        guidance: that is best for sampling, by a sweep.
    """

    config: Path
    network: type[Any]
    guidance: float


WAN = TeacherRecipe(CONFIG, WanTransformer3DModel, GUIDANCE)
COGVIDEOX = TeacherRecipe(
    Path("examples/distillation/tiny_cogvideox_sft.yaml"), CogVideoXTransformer3DModel, COGVIDEOX_GUIDANCE
)


def train_teacher(out: Path, recipe: TeacherRecipe = WAN) -> dict[str, float]:
    """Train the transformer in `out`/pipeline, keep all runs in `out`, install the result."""
    runs = [out / f"teacher-{number}" for number in range(1, 2 + FURTHER_RUNS)]
    distil(recipe.config, out / "pipeline", runs[0], {})
    for before, run in itertools.pairwise(runs):
        distil(recipe.config, out / "pipeline", run, {**FURTHER, "--roles.student.path": str(before / "student")})
    install(runs[-1] / "student", out / "pipeline", recipe)
    last = (runs[-1] / "metrics.jsonl").read_text().splitlines()[-1]
    return {"loss": json.loads(last)["student/loss"]}


def distil(config: Path, pipeline: Path, output: Path, flags: dict[str, str]) -> None:
    """One run of the command line."""
    flags = {"--config": str(config), "--model.path": str(pipeline), "--output": str(output), **flags}
    command = [
        sys.executable,
        "-m",
        "fastvideo.training.distillation",
        *(part for item in flags.items() for part in item),
    ]
    subprocess.run([*command, *(["--overwrite"] if (output / "config.yaml").is_file() else [])], check=True)


def install(trained: Path, pipeline: Path, recipe: TeacherRecipe = WAN) -> None:
    """Put the transformer of a trained model folder into `pipeline`, in half precision, with how it is sampled."""
    transformer = recipe.network.from_pretrained(trained, subfolder="transformer", torch_dtype=torch.float32)
    save_half(transformer, pipeline / "transformer")
    sampled = {"sampler": "euler", "guidance": recipe.guidance, "model": MODEL}
    (pipeline / "recipe.json").write_text(json.dumps(sampled, indent=2) + "\n", encoding="utf-8")
