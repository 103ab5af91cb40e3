"""A run of a method of flow maps, from config to video: its head travels with the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.adapters.diffusers.flow_map import HEAD_FILE, head_of
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.inference.export_source import find_source, load_source
from fastvideo.inference.loading import load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.tests.inference.exporting import export
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up", "a red three"]
ROLES = {"student": {"trainable": True}, "teacher": {"trainable": False}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of MeanFlow on the tiny world, with a checkpoint after each and a validation at the end."""
    root = tmp_path_factory.mktemp("flow-map")
    values: dict[str, Any] = {
        "distill_model": "wan",
        "distill_method": "mean_flow",
        "output": str(root / "run"),
        "device": "cpu",
        "model": {"path": "tiny"},
        "roles": ROLES,
        "method": {"learning_rate": 0.01, "equal_times": 0.0, "teacher_guidance": 1.5},
        "data": {"size": 4, "batch_size": 2, "cache": str(root / "cache")},
        "trainer": {"max_steps": 2},
        "ema": {"decay": 0.5},
        "checkpoint": {"every": 1},
        "validation": {"every": 2, "prompts": PROMPTS},
    }
    return run(validate(run_schema("wan", "mean_flow"), values, "test")).parent


@pytest.mark.slow
def test_the_student_of_a_run_is_a_flow_map_with_its_sampler_and_its_head(finished: Path, tmp_path: Path) -> None:
    recipe = json.loads((finished / "student" / "recipe.json").read_text())
    assert recipe["sampler"] == "flow_map"
    assert (finished / "student" / HEAD_FILE).is_file()
    model = load_model(str(finished / "student"))
    assert head_of(model.network) is not None
    assert bool(model.network.get_parameter("flow_map_head.last.weight").any()), "it was trained"
    by_steps = {
        n: sample_latents(model.adapter, model.denoiser, Sampling(PROMPTS, model.sampler(n), 1)) for n in (1, 3)
    }
    assert all(bool(x.isfinite().all()) for x in by_steps.values())
    assert not torch.equal(by_steps[1], by_steps[3])


@pytest.mark.slow
def test_a_checkpoint_holds_the_head_and_an_export_keeps_it(finished: Path, tmp_path: Path) -> None:
    live = load_source(find_source(str(finished), "live"))
    averaged = load_source(find_source(str(finished), "ema"))
    heads = [model.network.get_parameter("flow_map_head.last.weight") for model in (live, averaged)]
    assert not torch.equal(*heads)
    folder = export(finished, tmp_path / "out", "--live")
    back = load_model(str(folder)).network.get_parameter("flow_map_head.last.weight")
    assert torch.equal(back, heads[0])
