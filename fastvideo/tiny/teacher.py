"""The tiny world's teacher: the `sft` method on the latents of real videos, started as a user would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from fastvideo.tiny.pipeline import save_half

CONFIG = Path("examples/distillation/tiny_wan_sft.yaml")
GUIDANCE = 1.5  # the best of a sweep: fastvideo evaluate tiny --sweep-guidance 1,1.25,1.5,1.75,2,2.5


def train_teacher(out: Path, config: Path = CONFIG) -> dict[str, float]:
    """Train the transformer in `out`/pipeline as `config` says, keep the run in `out`/teacher, install the result."""
    flags = ["--config", str(config), "--model.path", str(out / "pipeline"), "--output", str(out / "teacher")]
    command = [sys.executable, "-m", "fastvideo.training.distillation", *flags]
    if (out / "teacher" / "config.yaml").is_file():
        command.append("--overwrite")
    subprocess.run(command, check=True)
    install(out / "teacher" / "student", out / "pipeline")
    last = (out / "teacher" / "metrics.jsonl").read_text().splitlines()[-1]
    return {"loss": json.loads(last)["student/loss"]}


def install(trained: Path, pipeline: Path) -> None:
    """Put the transformer of a trained model folder into `pipeline`, in half precision, with the guidance it likes."""
    transformer = WanTransformer3DModel.from_pretrained(trained, subfolder="transformer", torch_dtype=torch.float32)
    save_half(transformer, pipeline / "transformer")
    recipe = {"sampler": "euler", "guidance": GUIDANCE}
    (pipeline / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
