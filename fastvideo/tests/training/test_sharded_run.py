"""A whole run over split networks, with averages, validation and a resume, ends where a plain one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastvideo.training.distillation as entry
from fastvideo.distillation.engine.optional.profiles import Profile
from fastvideo.distillation.engine.optional.snapshots import snapshots_in
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.launch import config_file, torchrun

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def launch(values: dict[str, Any], *flags: str) -> Path:
    """Two processes under torchrun; the result's folder."""
    child = torchrun(2, entry.__file__, "--config", str(config_file(values)), *flags)
    assert child.wait(600) == 0, child.text[-3000:]
    return Path(values["output"]) / "student"


def values_of(root: Path, output: Path, lora: dict[str, Any] | None) -> dict[str, Any]:
    prompts = root / "prompts.txt"
    prompts.write_text("a green seven\nred three\na blurry seven\nthree moving up\n" * 4)
    trained: dict[str, Any] = {"trainable": True, "lora": lora}
    return {
        "distill_model": "wan", "distill_method": "dmd2", "output": str(output), "device": "cpu",
        "model": {"path": str(wan_folder(root)), "height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8},
        "roles": {"student": trained, "teacher": {"trainable": False}, "critic": trained},
        "ladder": {"times": [1.0, 0.5]},
        "method": {"generator_update_interval": 1, "student_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
                   "teacher_guidance": 2.0, "betas": [0.5, 0.9]},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 4, "log_every": 2},
        "validation": {"every": 2, "prompts": ["a green seven"]},
        "checkpoint": {"every": 2},
        "ema": {"post_hoc": {"every": 1, "keep": 4, "precision": "float32"}},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [None, pytest.param({"rank": 4}, marks=pytest.mark.nightly)], ids=["whole", "adapters"]
)
def test_a_sharded_run_and_its_resume_end_where_a_data_parallel_run_does(lora: Any, tmp_path: Path) -> None:
    plain = launch(values_of(tmp_path, tmp_path / "plain", lora))
    sharded = values_of(tmp_path, tmp_path / "sharded", lora) | {"parallel": {"shard": 2}}
    launch(sharded, "--trainer.max-steps", "2")
    result = launch(sharded, "--resume")
    found, expected = load_file(result / WEIGHTS), load_file(plain / WEIGHTS)
    start = load_file(wan_folder(tmp_path) / WEIGHTS)
    assert found.keys() == expected.keys()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    for name, tensor in expected.items():
        # AdamW makes a step of rounding alone where a gradient is zero, as that of a key's bias is.
        off = ((found[name] - tensor).abs() > 0.02 * moved).float().mean()
        assert off < 0.05, name
    assert torch.isfinite(torch.stack([t.float().sum() for t in found.values()])).all()
    kept, whole = (snapshots_in(tmp_path / name / "snapshots") for name in ("sharded", "plain"))
    assert list(kept) == list(whole) == [Profile(update, std) for update in range(1, 5) for std in (0.05, 0.1)]
    for profile, file in kept.items():
        tensors, same = load_file(file), load_file(whole[profile])
        assert tensors.keys() == same.keys()
        off = torch.cat([((tensors[name] - same[name]).abs() > 0.02 * moved).flatten() for name in same])
        assert off.float().mean() < 0.05, profile
    assert load_model(str(result)).is_student
    videos = {file.name for file in (tmp_path / "sharded" / "validation").glob("*.mp4")}
    assert videos >= {f"step-{step:06d}-{kind}.mp4" for step in (2, 4) for kind in ("ema", "student")}
