"""Rollouts against closed forms: the sampler that fits a student gives N(MEAN, STD^2), the other one is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticAdapter
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import Velocity, few_step, renoise
from fastvideo.distillation.samplers import euler
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, gaussian

LADDER = (1.0, 0.9375, 5 / 6, 0.625)
DRAWS = (50_000, 1, 1, 1, 2)


class Counter:
    """A velocity of one scale parameter that notes how it was called."""

    def __init__(self) -> None:
        self.scale = torch.tensor(0.5, requires_grad=True)
        self.modes, self.times = "", list[float]()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert t.shape == (x_t.shape[0],)
        self.modes += "g" if torch.is_grad_enabled() else "n"
        self.times.append(float(t[0]))
        return self.scale * x_t


def fresh(seed: int) -> Callable[[Tensor], Tensor]:
    """Noise draws of a stream of their own."""
    generator = seeded(seed)
    return lambda x: normal(tuple(x.shape), generator, dtype=x.dtype)


def exact(adapter: AnalyticAdapter, kind: str, mean: float = MEAN, std: float = STD) -> Velocity:
    """The velocity of an exact network of N(mean, std^2), without gradient."""
    network = gaussian(adapter, kind, mean, std).requires_grad_(False)
    return lambda x_t, t: adapter.velocity(network, x_t, t, adapter.conditioner.negative(x_t.shape[0]))


def start() -> Tensor:
    return normal(DRAWS, seeded(1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_step_makes_one_call_per_rung_and_only_the_last_has_gradient(count: int) -> None:
    velocity = Counter()
    x0 = few_step(velocity, normal((2, 1, 1, 2, 2), seeded(0)), LADDER[:count], fresh(2))
    assert velocity.modes == "n" * (count - 1) + "g"
    assert velocity.times == pytest.approx(LADDER[:count])
    assert x0.requires_grad


def test_gradient_flows_through_the_last_call_alone() -> None:
    velocity, noise = Counter(), normal((2, 1, 1, 2, 2), seeded(0))
    last_input = renoise(velocity, noise, LADDER, fresh(2))
    assert not last_input.requires_grad
    (found,) = torch.autograd.grad(few_step(velocity, noise, LADDER, fresh(2)).sum(), velocity.scale)
    torch.testing.assert_close(found, (-LADDER[-1] * last_input).sum())


def test_few_step_inside_no_grad_has_no_gradient() -> None:
    velocity = Counter()
    with torch.no_grad():
        x0 = few_step(velocity, normal((2, 1, 1, 2, 2), seeded(0)), LADDER, fresh(2))
    assert velocity.modes == "nnnn"
    assert not x0.requires_grad


def test_rollouts_restore_the_gradient_mode() -> None:
    renoise(Counter(), normal((1, 1, 1, 2, 2), seeded(0)), LADDER, fresh(2))
    euler(Counter(), normal((1, 1, 1, 2, 2), seeded(0)), LADDER)
    assert torch.is_grad_enabled()


def test_every_renoising_is_fresh_noise() -> None:
    draws: list[Tensor] = []

    def noise_like(x: Tensor) -> Tensor:
        draws.append(normal(tuple(x.shape), seeded(len(draws))))
        return draws[-1]

    few_step(Counter(), normal((1, 1, 1, 2, 2), seeded(9)), LADDER, noise_like)
    assert len(draws) == len(LADDER) - 1
    few_step(Counter(), normal((1, 1, 1, 2, 2), seeded(9)), LADDER[:1], noise_like)
    assert len(draws) == len(LADDER) - 1


@pytest.mark.parametrize("times", [LADDER, (1.0,), (1.0, 0.3), (1.0, 0.99, 0.5, 0.1, 0.01)])
def test_an_exact_consistency_function_gives_the_truth_on_any_ladder(
    times: tuple[float, ...], adapter: SpyAdapter
) -> None:
    x0 = few_step(exact(adapter, "consistency"), start(), times, fresh(2))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.var()) == pytest.approx(STD**2, rel=0.02)


def test_a_denoiser_under_the_renoising_sampler_collapses_as_the_recursion_says(adapter: SpyAdapter) -> None:
    variance = 1.0
    for i, t in enumerate(LADDER):
        before = 1.0 if i == 0 else (1 - t) ** 2 * variance + t**2
        variance = ((1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)) ** 2 * before
    assert variance == pytest.approx(0.00824, abs=5e-6)
    x0 = few_step(exact(adapter, "denoiser"), start(), LADDER, fresh(2))
    assert float(x0.var()) == pytest.approx(variance, rel=0.03)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)


def test_a_consistency_function_under_euler_is_caught(adapter: SpyAdapter) -> None:
    times = (1.0, 0.1)
    right = few_step(exact(adapter, "consistency"), start(), times, fresh(2))
    wrong = euler(exact(adapter, "consistency"), start(), times)
    on_the_chord, on_the_flow = (0.9 * STD + 0.1) ** 2, 0.9**2 * STD**2 + 0.1**2
    assert float(right.var()) == pytest.approx(STD**2, rel=0.02)
    assert float(wrong.var()) == pytest.approx(STD**2 * on_the_chord / on_the_flow, rel=0.02)
    assert float(wrong.var()) > 1.4 * STD**2


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_the_state_at_a_stop_has_the_marginal_of_its_noise_level(stop: int, adapter: SpyAdapter) -> None:
    mean, std, t = -0.5, 1.2, LADDER[stop]
    x_t = renoise(exact(adapter, "consistency", mean, std), start(), LADDER[: stop + 1], fresh(2))
    assert float(x_t.mean()) == pytest.approx((1 - t) * mean, abs=0.015)
    assert float(x_t.var()) == pytest.approx((1 - t) ** 2 * std**2 + t**2, rel=0.02)


def test_euler_on_the_exact_velocity_converges_to_the_quantile_map_at_first_order(adapter: SpyAdapter) -> None:
    noise = normal((64, 1, 1, 1, 1), seeded(1))
    truth = MEAN + STD * noise
    errors = []
    for count in (50, 100, 200):
        x0 = euler(exact(adapter, "denoiser"), noise, tuple(1 - i / count for i in range(count)))
        errors.append(float((x0 - truth).abs().max()))
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.15)


def test_euler_makes_one_call_per_step_without_gradient() -> None:
    velocity = Counter()
    euler(velocity, normal((1, 1, 1, 2, 2), seeded(0)), LADDER)
    assert velocity.modes == "nnnn"
    assert velocity.times == pytest.approx(LADDER)


def test_euler_uses_the_gaps_of_the_ladder_down_to_zero() -> None:
    noise = torch.ones(1, 1, 1, 1, 1)
    x0 = euler(lambda x, t: torch.ones_like(x), noise, (1.0, 0.7, 0.1))
    assert float(x0) == pytest.approx(0.0, abs=1e-6)
    x0 = euler(lambda x, t: t.view(-1, 1, 1, 1, 1), noise, (1.0, 0.7, 0.1))
    assert float(x0) == pytest.approx(1 - (0.3 * 1.0 + 0.6 * 0.7 + 0.1 * 0.1), abs=1e-6)
