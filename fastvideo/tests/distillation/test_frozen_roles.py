"""``RoleLoss.frozen`` where blocks are computed again in backward: only the trained role gets a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.schema import TrainerConfig
from fastvideo.distillation.engine.runtime import Runtime, Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import RawBatch
from fastvideo.tests.distillation.test_method_contract import move_apart
from fastvideo.tests.preparing import preparer

PROMPTS = ("a green seven", "red three moving up")


def gan(folder: Path, recompute: str, roles: dict[str, Any]) -> Any:
    """DMD2 with a discriminator on the features of the critic, which is trained itself."""
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2_gan",
        "output": "unused",
        "model": {"path": str(folder), "height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8},
        "roles": {
            "student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True},
            "discriminator": {"trainable": True},
        },
        "ladder": {"times": [1.0, 0.5]},
        "method": {"features_of": "critic", "gan_weight": 1.0, "generator_update_interval": 1},
        "parallel": {"activation_checkpointing": recompute},
    }  # fmt: skip
    values["roles"] |= roles
    config = validate(run_schema("wan", "dmd2_gan"), values, "test")
    method = build_method(config, build_adapter(config))
    move_apart(method)
    return method


def gradients_of_the_students_loss(method: Any) -> dict[str, dict[str, Tensor | None]]:
    """Gradients by role and parameter after the first loss of a step has gone through the runtime."""
    adapter = method.student.adapter
    x0 = torch.randn((2, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(5))
    batch = preparer(adapter)(RawBatch(PROMPTS, x0))
    runtime = Runtime(method, TrainerConfig(), Tracker(Path(), enabled=False))
    with runtime.step(0, method.active_roles(0)):
        next(runtime.micro_batches(iter([RawBatch(PROMPTS, x0)])))
        loss = next(method.losses(batch, 0))
        assert (loss.role, set(loss.frozen)) == ("student", {"critic", "discriminator"})
        runtime.backward(loss)
    return {handle.name: {n: p.grad for n, p in handle.named_parameters().items()} for handle in method.bundle}


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("lora", [False, True], ids=["full roles", "adapters"])
def test_recomputed_blocks_give_frozen_roles_no_gradient(kind: str, lora: bool, tiny_wan: Path) -> None:
    """The student's is the same as with all activations kept; critic and discriminator can be trained afterwards."""
    adapters = {role: {"trainable": True, "lora": {"rank": 2}} for role in ("student", "critic")} if lora else {}
    method = gan(tiny_wan, kind, adapters)
    kept = gradients_of_the_students_loss(gan(tiny_wan, "none", adapters))
    found = gradients_of_the_students_loss(method)
    for name, gradient in found["student"].items():
        torch.testing.assert_close(gradient, kept["student"][name], rtol=1e-5, atol=1e-8, msg=name)
    assert sum(float(g.abs().sum()) for g in found["student"].values() if g is not None) > 0
    for role in ("critic", "discriminator"):
        assert found[role]
        assert all(gradient is None for gradient in found[role].values()), role
        assert all(parameter.requires_grad for parameter in method.bundle[role].parameters())
