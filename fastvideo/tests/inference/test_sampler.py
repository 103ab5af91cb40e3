"""Sampling depends on (seed, position of the prompt) and on nothing else."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.schedule import Ladder
from fastvideo.inference.sampler import SamplerSpec, generate_batches, generate_latents

LADDER = Ladder((1.0, 0.75, 0.5, 0.25))
STUDENT = SamplerSpec.student(LADDER)
TEACHER = SamplerSpec.teacher(Ladder.uniform(50).times, guidance=2.0)


def teacher(guidance: float) -> SamplerSpec:
    return SamplerSpec.teacher(Ladder.uniform(20).times, guidance)


PROMPTS = ["0", "0.5", "-1", "2", "", "0.1", "1"]


@pytest.fixture
def adapter() -> AnalyticAdapter:
    return AnalyticAdapter(AnalyticConfig(means=(-0.6, 0.9), stds=(0.2, 0.3), weights=(1.0, 2.0), shape=(2, 1, 4, 4)))


@pytest.mark.parametrize("spec", [STUDENT, TEACHER])
def test_batching_does_not_change_a_sample(adapter: AnalyticAdapter, spec: SamplerSpec) -> None:
    network = adapter.folder.load_network()
    whole = generate_latents(adapter, network, PROMPTS, spec, seed=3, batch_size=64)
    parts = generate_latents(adapter, network, PROMPTS, spec, seed=3, batch_size=2)
    assert whole.shape == (7, 2, 1, 4, 4)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_seed_and_position_choose_the_noise(adapter: AnalyticAdapter) -> None:
    network = adapter.folder.load_network()
    same = generate_latents(adapter, network, ["1", "1"], STUDENT, seed=0)
    other = generate_latents(adapter, network, ["1", "1"], STUDENT, seed=1)
    assert not torch.allclose(same[0], same[1])
    assert not torch.allclose(same, other)
    torch.testing.assert_close(same, generate_latents(adapter, network, ["1", "1"], STUDENT, seed=0), rtol=0, atol=0)


def test_all_samplers_start_from_the_same_noise(adapter: AnalyticAdapter) -> None:
    """Rows of a comparison differ by their sampler alone: one step of either sampler is the same map."""
    network = adapter.folder.load_network()
    euler = generate_latents(adapter, network, PROMPTS, SamplerSpec((1.0,), 1.0, "euler"), seed=5)
    renoise = generate_latents(adapter, network, PROMPTS, SamplerSpec((1.0,), 1.0, "renoise"), seed=5)
    torch.testing.assert_close(euler, renoise)


def test_guidance_one_is_one_call_per_step() -> None:
    assert STUDENT.network_calls == 4
    assert TEACHER.network_calls == 100
    assert SamplerSpec.teacher(Ladder.uniform(50, shift=3.0).times, 1.0).network_calls == 50


@pytest.mark.parametrize("spec", [STUDENT, TEACHER])
def test_progress_counts_every_call_of_every_sample(adapter: AnalyticAdapter, spec: SamplerSpec) -> None:
    counted: list[int] = []
    generate_latents(
        adapter, adapter.folder.load_network(), PROMPTS, spec, seed=0, batch_size=3, progress=counted.append
    )
    assert sum(counted) == len(PROMPTS) * spec.network_calls


def test_guidance_moves_along_the_prompt(adapter: AnalyticAdapter) -> None:
    network = adapter.folder.load_network()
    plain = generate_latents(adapter, network, ["1"] * 8, teacher(1.0), seed=0).mean()
    guided = generate_latents(adapter, network, ["1"] * 8, teacher(3.0), seed=0).mean()
    away = generate_latents(adapter, network, ["1"] * 8, teacher(3.0), seed=0, negative_prompt="2").mean()
    assert away < plain < guided


def test_batches_are_timed(adapter: AnalyticAdapter) -> None:
    batches = list(generate_batches(adapter, adapter.folder.load_network(), PROMPTS, STUDENT, seed=0, batch_size=4))
    assert [len(batch.latents) for batch in batches] == [4, 3]
    assert all(batch.seconds > 0 for batch in batches)
