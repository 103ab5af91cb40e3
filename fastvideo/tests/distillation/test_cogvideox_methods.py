"""Every method trains CogVideoX as it is: whole runs, from the config to a folder that can be sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter
from fastvideo.distillation.builder import lacks
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.interpolant import Interpolant
from fastvideo.distillation.noise import add_noise, expand_time
from fastvideo.distillation.registry import METHODS, load_method, run_schema
from fastvideo.distillation.rng import normal, seeded
from fastvideo.inference.loading import load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.tests.distillation.tiny import cogvideox_config, cogvideox_folder
from fastvideo.training.run import run

FITTING = [
    name
    for name, method in ((name, load_method(name)) for name in METHODS)
    if not method.needs_trajectories and not lacks(method.Config(), method, CogVideoXAdapter)
    if "frame_teacher" not in method.frozen_roles  # of an image family
]
"""Methods that train this family alone on latents or prompts."""
WORLD = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}


def config_of(name: str, folder: Path, output: Path, **model: Any) -> Any:
    """Two steps of a method on the tiny world, other options at their defaults."""
    method = load_method(name)
    roles = {role: {"trainable": role in method.trainable_roles} for role in method.trainable_roles}
    roles |= {role: {"trainable": False} for role in method.frozen_roles}
    # High rates, so that two steps move a weight of 1 by more than it is rounded to.
    rates = [field for field in load_method(name).Config.model_fields if field.endswith("learning_rate")]
    values = {
        "distill_model": "cogvideox",
        "distill_method": name,
        "output": str(output / "run"),
        "model": {"path": str(folder), **WORLD, **model},
        "roles": roles,
        "ladder": {"times": [1.0, 0.75, 0.5]},  # tcm goes no lower
        "method": dict.fromkeys(rates, 1e-2) | _allowed(name),
        "data": {"path": "tiny", "size": 8, "batch_size": 2, "cache": str(output / "cache")},
        "trainer": {"max_steps": 2, "log_every": 1},
    }
    return validate(run_schema("cogvideox", name), values, "test")


def _allowed(name: str) -> dict[str, bool]:
    """The teacher is no autoregressive one."""
    option = "allow_bidirectional_teacher"
    return {option: True} if option in load_method(name).Config.model_fields else {}


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", FITTING)
def test_a_run_trains_the_student_and_leaves_a_model_that_samples(
    name: str, precision: str, tiny_wan: Path, tmp_path: Path
) -> None:
    source = cogvideox_folder(tiny_wan.parent)
    student = run(config_of(name, source, tmp_path, precision=precision))
    before = CogVideoXAdapter(cogvideox_config(source)).folder.load_network()
    after = dict(load_model(str(student), exact=True).network.named_parameters())
    assert not [key for key, value in before.named_parameters() if torch.equal(after[key], value)]
    model = load_model(str(student))
    assert model.network.dtype == getattr(torch, precision)
    latents = sample_latents(model.adapter, model.denoiser, Sampling(["a green seven"], model.sampler(), 0))
    assert latents.shape == (1, 4, 3, 4, 4)
    assert latents.isfinite().all()


def test_a_network_that_knows_v_comes_out_as_noise_minus_data(tiny_wan: Path) -> None:
    """At every time from clean to pure noise; what is fed is the sample on CogVideoX's own schedule."""
    adapter = CogVideoXAdapter(cogvideox_config(cogvideox_folder(tiny_wan.parent)))
    x0, noise = (normal((6, *adapter.codec.latent_shape), seeded(seed)) for seed in (1, 2))
    t = torch.tensor([0.0, 0.01, 0.3, 0.7, 0.9999, 1.0])
    native = Interpolant.trigflow(torch.atan2(t.double(), 1 - t.double()))
    alpha, sigma = (expand_time(c, x0).float() for c in (native.alpha, native.sigma))

    class Truth(nn.Module):
        config = adapter.folder.load_network().config

        def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor]:
            torch.testing.assert_close(hidden_states.transpose(1, 2), alpha * x0 + sigma * noise)
            return ((alpha * noise - sigma * x0).transpose(1, 2),)

    u = adapter.velocity(Truth(), add_noise(x0, noise, t), t, adapter.conditioner.encode_prompts(["a"] * 6))
    torch.testing.assert_close(u, noise - x0)
