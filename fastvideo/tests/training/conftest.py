"""Runs of the analytic family: a whole training in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def analytic_values(tmp_path: Path) -> dict[str, Any]:
    """A complete DMD2 run on a Gaussian, as YAML would give it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0.0\n" * 64)
    return {
        "distill_model": "analytic",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"means": [0.7], "stds": [0.4], "weights": [1.0]},
        "roles": {
            "student": {"trainable": True, "path": "consistency"},
            "teacher": {"trainable": False},
            "critic": {"trainable": True},
        },
        "method": {"teacher_guidance": 1.0, "student_learning_rate": 0.01, "critic_learning_rate": 0.01},
        "data": {"prompts": str(prompts), "batch_size": 4},
        "trainer": {"max_steps": 12, "log_every": 3},
    }
