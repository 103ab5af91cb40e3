"""A real run of toy Wan, for everything that starts from a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.distillation.tiny import wan_config, wan_folder
from fastvideo.tests.inference.exporting import PROMPTS
from fastvideo.training.run import run

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of DMD2 on toy Wan: two steps, a checkpoint after each, averaged weights far from the live ones,
    and snapshots of averages."""
    root = tmp_path_factory.mktemp("run")
    (root / "prompts.txt").write_text("\n".join(PROMPTS * 2) + "\n")
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "device": "cpu",
        "model": wan_config(wan_folder(root)).model_dump(),
        "roles": {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}},
        "ladder": {"steps": [1000, 750, 500, 250], "shift": 5.0},
        "method": {"student_learning_rate": 0.01, "generator_update_interval": 1},
        "data": {"prompts": str(root / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 2},
        "ema": {"decay": 0.5, "post_hoc": {"every": 1, "precision": "float32"}},
        "checkpoint": {"every": 1},
    }
    return run(validate(run_schema("wan", "dmd2"), values, "test")).parent


@pytest.fixture
def student(distilled: Path, tmp_path: Path) -> Callable[..., Path]:
    """The run's student with another recipe, as a model folder."""

    def make(**recipe: Any) -> Path:
        folder = tmp_path / "given"
        shutil.copytree(distilled / "student", folder)
        saved = json.loads((folder / "recipe.json").read_text())
        (folder / "recipe.json").write_text(json.dumps(saved | recipe))
        return folder

    return make
