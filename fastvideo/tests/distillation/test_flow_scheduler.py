"""The stock flow scheduler walks a student's ladder, and its step agrees with the adapter's velocity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from hypothesis import assume, given
from hypothesis import strategies as st

from fastvideo.distillation.adapters.export.base import deviation
from fastvideo.distillation.adapters.export.flow_match import flow_match_sampler
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.grids import published_ladder, uniform_ladder
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import wan_config

EXACT = 1e-6
SHIFTED = published_ladder([1000, 750, 500, 250], shift=5.0).times


@given(st.integers(1, 12), st.floats(0.2, 12.0))
def test_a_uniform_ladder_under_any_shift_is_met_exactly(count: int, shift: float) -> None:
    times = uniform_ladder(count, shift=shift).times
    assert deviation(flow_match_sampler(times, "renoise").times, times) < EXACT


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_three_rungs_from_pure_noise_are_met_exactly(second: float, third: float) -> None:
    times = (1.0, 0.05 + 0.9 * second, (0.05 + 0.9 * second) * third)
    sampler = flow_match_sampler(times, "euler")
    assume(0.2 < sampler.scheduler.config.shift < 15)
    assert deviation(sampler.times, times) < EXACT


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 0.757, 0.522), (1.0, 0.75, 0.5, 0.25), SHIFTED])
@pytest.mark.parametrize("kind", ["renoise", "euler"])
def test_a_scheduler_built_from_the_saved_config_yields_the_ladder(
    times: tuple[float, ...], kind: str, tmp_path: Path
) -> None:
    sampler = flow_match_sampler(times, kind)
    sampler.scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(len(times))
    torch.testing.assert_close(loaded.sigmas, torch.tensor((*times, 0.0)), rtol=0, atol=EXACT)
    torch.testing.assert_close(loaded.timesteps, 1000 * torch.tensor(times), rtol=0, atol=1000 * EXACT)
    assert loaded.config.stochastic_sampling == (kind == "renoise")


def test_a_ladder_out_of_reach_comes_with_the_times_that_stock_diffusers_uses_instead() -> None:
    times = (1.0, 0.9, 0.2, 0.1)
    sampler = flow_match_sampler(times, "renoise")
    sampler.scheduler.set_timesteps(4)
    assert sampler.times == tuple(sampler.scheduler.sigmas[:-1].tolist())
    assert (sampler.times[0], round(sampler.times[-1], 6)) == (1.0, 0.1)
    best = min(
        deviation(_yielded(shift, 0.1, 4), times) for shift in torch.logspace(-1.5, 1.5, 400, dtype=torch.float64)
    )
    assert deviation(sampler.times, times) <= best + 1e-3, "no shift does better"
    assert deviation(sampler.times, times) > 0.1


def _yielded(shift: torch.Tensor, terminal: float, steps: int) -> tuple[float, ...]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift), shift_terminal=terminal)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas[:-1].tolist())


def test_a_ladder_that_starts_below_pure_noise_is_not_claimed() -> None:
    assert flow_match_sampler((0.9,), "renoise").times == (1.0,)


def test_a_sampler_that_stock_diffusers_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="'flow_map' has no stock counterpart"):
        flow_match_sampler((1.0, 0.5), "flow_map")


@pytest.mark.parametrize("weights", ["random", "embedded"])
@torch.no_grad()
def test_our_velocity_is_the_one_that_the_stock_step_moves_along(weights: str, tiny_wan: Path) -> None:
    adapter = WanFamily(wan_config(tiny_wan) if weights == "random" else WanFamilyConfig())
    pipeline = WanPipeline.from_pretrained(adapter.folder.pipeline.source)
    scheduler, network = flow_match_sampler(SHIFTED, "euler").scheduler, adapter.folder.load_network()
    condition = adapter.conditioner.encode_prompts(["a green seven moving up", "red three"])
    for index, t in enumerate(SHIFTED):
        states = [normal((2, *adapter.codec.latent_shape), seeded(seed)) for seed in (index, 10 + index)]
        times = torch.full((2,), t)
        x_t = add_noise(*states, times)
        timestep = scheduler.timesteps[index]
        embeds = condition.of(adapter.conditioner.key)["prompt_embeds"]
        (predicted,) = pipeline.transformer(x_t, timestep.expand(2), embeds, return_dict=False)
        scheduler.set_begin_index(index)
        scheduler._step_index = None
        moved = scheduler.step(predicted, timestep, x_t, return_dict=False)[0]
        after = (*SHIFTED, 0.0)[index + 1]
        expected = (x_t - moved) / (t - after)
        found = adapter.velocity(network, x_t, times, condition)
        assert expected.abs().mean() > 1e-2
        assert (found - expected).norm() / expected.norm() < 1e-5
