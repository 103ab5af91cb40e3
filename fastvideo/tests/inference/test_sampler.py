"""A sample depends on seed and prompt, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.inference.sampler import Sampling, sample_batches, sample_latents

LADDER = Ladder((1.0, 0.75, 0.5, 0.25))
STUDENT = SamplerSpec.student(LADDER)
TEACHER = SamplerSpec.teacher(uniform_ladder(50).times, guidance=2.0)


def teacher(guidance: float) -> SamplerSpec:
    return SamplerSpec.teacher(uniform_ladder(20).times, guidance)


PROMPTS = ["0", "0.5", "-1", "2", "", "0.1", "1"]


@pytest.fixture
def adapter() -> AnalyticAdapter:
    return AnalyticAdapter(AnalyticConfig(means=(-0.6, 0.9), stds=(0.2, 0.3), weights=(1.0, 2.0), shape=(2, 1, 4, 4)))


@pytest.mark.parametrize("spec", [STUDENT, TEACHER])
def test_batching_does_not_change_a_sample(adapter: AnalyticAdapter, spec: SamplerSpec) -> None:
    denoiser = Denoiser(adapter, adapter.folder.load_network())
    whole = sample_latents(adapter, denoiser, Sampling(PROMPTS, spec, 3, batch_size=64))
    parts = sample_latents(adapter, denoiser, Sampling(PROMPTS, spec, 3, batch_size=2))
    assert whole.shape == (7, 2, 1, 4, 4)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_a_prompt_alone_gives_what_it_gives_among_others(adapter: AnalyticAdapter) -> None:
    denoiser = Denoiser(adapter, adapter.folder.load_network())
    whole = sample_latents(adapter, denoiser, Sampling(PROMPTS, STUDENT, 3, 1))
    alone = sample_latents(adapter, denoiser, Sampling([PROMPTS[3]], STUDENT, 3))
    some = sample_latents(adapter, denoiser, Sampling(PROMPTS, STUDENT, 3, 1, rows=(5, 3)))
    assert torch.equal(whole[3:4], alone)
    assert torch.equal(whole[[5, 3]], some)


def test_seed_and_occurrence_choose_the_noise(adapter: AnalyticAdapter) -> None:
    denoiser = Denoiser(adapter, adapter.folder.load_network())
    same = sample_latents(adapter, denoiser, Sampling(["1", "1"], STUDENT, 0))
    other = sample_latents(adapter, denoiser, Sampling(["1", "1"], STUDENT, 1))
    assert not torch.allclose(same[0], same[1])
    assert not torch.allclose(same, other)
    torch.testing.assert_close(
        same, sample_latents(adapter, denoiser, Sampling(["1", "1"], STUDENT, 0)), rtol=0, atol=0
    )


def test_all_samplers_start_from_the_same_noise(adapter: AnalyticAdapter) -> None:
    """Rows of a comparison differ by their sampler alone: one step of either sampler is the same map."""
    denoiser = Denoiser(adapter, adapter.folder.load_network())
    euler = sample_latents(adapter, denoiser, Sampling(PROMPTS, SamplerSpec((1.0,), 1.0, "euler"), 5))
    renoise = sample_latents(adapter, denoiser, Sampling(PROMPTS, SamplerSpec((1.0,), 1.0, "renoise"), 5))
    torch.testing.assert_close(euler, renoise)


def test_guidance_one_is_one_call_per_step() -> None:
    assert STUDENT.network_calls == 4
    assert TEACHER.network_calls == 100
    assert SamplerSpec.teacher(uniform_ladder(50, shift=3.0).times, 1.0).network_calls == 50


@pytest.mark.parametrize("spec", [STUDENT, TEACHER])
def test_progress_counts_every_call_of_every_sample(adapter: AnalyticAdapter, spec: SamplerSpec) -> None:
    counted: list[int] = []
    sample_latents(
        adapter, Denoiser(adapter, adapter.folder.load_network()), Sampling(PROMPTS, spec, 0, 3), counted.append
    )
    assert sum(counted) == len(PROMPTS) * spec.network_calls


def test_guidance_moves_along_the_prompt(adapter: AnalyticAdapter) -> None:
    denoiser = Denoiser(adapter, adapter.folder.load_network())
    plain = sample_latents(adapter, denoiser, Sampling(["1"] * 8, teacher(1.0), 0)).mean()
    guided = sample_latents(adapter, denoiser, Sampling(["1"] * 8, teacher(3.0), 0)).mean()
    away = sample_latents(adapter, denoiser, Sampling(["1"] * 8, teacher(3.0), 0, negative_prompt="2")).mean()
    assert away < plain < guided


def test_batches_are_timed(adapter: AnalyticAdapter) -> None:
    batches = list(
        sample_batches(adapter, Denoiser(adapter, adapter.folder.load_network()), Sampling(PROMPTS, STUDENT, 0, 4))
    )
    assert [len(batch.latents) for batch in batches] == [4, 3]
    assert all(batch.seconds > 0 for batch in batches)
