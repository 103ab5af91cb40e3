"""Phased DMD: diffusion on from ``x_s`` in closed form, phases in turn, and what a phase does not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.methods.distribution_matching.phase import Phase, within
from fastvideo.distillation.noise import add_noise, shift_time, velocity_target, velocity_to_x0
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.toys import SpyAdapter, analytic_batch, toy_method

S, T, STD = 0.52, 0.8, 0.4
"""Start and time of the phase, deviation of clean samples: the exact velocity has the slope 1.1881 there."""
COUNT = 200_000


def drawn(seed: int, count: int = COUNT) -> Tensor:
    return normal((count, 1, 1, 1, 1), seeded(seed)).double()


def slope(x: Tensor, y: Tensor) -> float:
    """Of the regression of ``y`` on ``x``, both of mean 0."""
    return float((x * y).sum() / x.square().sum())


@pytest.fixture(scope="module")
def diffused() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_s`` of clean samples N(0, STD^2), fresh noise, ``x_t`` and its time."""
    x_s, noise, t = (1 - S) * STD * drawn(1) + S * drawn(2), drawn(3), torch.full((COUNT,), T, dtype=torch.float64)
    return x_s, noise, Phase(S).add_noise(x_s, noise, t), t


def test_samples_go_on_as_clean_ones_would_be_diffused(diffused: tuple[Tensor, ...]) -> None:
    x_t = diffused[2]
    assert float(x_t.var()) == pytest.approx((1 - T) ** 2 * STD**2 + T**2, rel=0.01)


def test_the_regression_on_the_target_is_the_velocity_and_on_the_naive_one_is_not(
    diffused: tuple[Tensor, ...],
) -> None:
    x_s, noise, x_t, t = diffused
    exact = (T - (1 - T) * STD**2) / ((1 - T) ** 2 * STD**2 + T**2)
    assert exact == pytest.approx(1.1881, abs=1e-4)
    assert slope(x_t, Phase(S).velocity_target(x_s, noise, t)) == pytest.approx(exact, abs=0.01)
    assert slope(x_t, velocity_target(x_s, noise)) == pytest.approx(0.993, abs=0.01)


def test_the_estimate_of_a_velocity_is_the_mean_of_the_noisy_sample(diffused: tuple[Tensor, ...]) -> None:
    x_s, _, x_t, t = diffused
    exact = (T - (1 - T) * STD**2) / ((1 - T) ** 2 * STD**2 + T**2)
    found = Phase(S).estimate(x_t, exact * x_t, t)
    assert slope(x_t, found) == pytest.approx(slope(x_t, x_s), abs=0.01)


def test_a_phase_from_clean_samples_is_rectified_flow() -> None:
    x0, noise, t = drawn(1, 5), drawn(2, 5), torch.tensor([0.1, 0.4, 0.9, 0.99, 1.0], dtype=torch.float64)
    phase = Phase(0.0)
    x_t = phase.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, add_noise(x0, noise, t))
    torch.testing.assert_close(phase.velocity_target(x0, noise, t), velocity_target(x0, noise))
    torch.testing.assert_close(phase.estimate(x_t, noise, t), velocity_to_x0(x_t, noise, t))


def test_target_and_estimate_are_finite_up_to_pure_noise() -> None:
    phase, t = Phase(0.875), torch.tensor([0.895, 0.98, 1.0])
    x_s, noise = drawn(1, 3).float(), drawn(2, 3).float()
    assert phase.velocity_target(x_s, noise, t).isfinite().all()
    assert phase.estimate(phase.add_noise(x_s, noise, t), noise, t).isfinite().all()
    torch.testing.assert_close(phase.add_noise(x_s, noise, t)[2], noise[2])


def test_times_within_a_range_are_the_shifted_uniform_ones_that_fall_into_it() -> None:
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    whole = shift_time(u, 5.0)
    kept = whole[(whole >= 0.3) & (whole <= 0.895)]
    found = within(u, 0.3, 0.895, 5.0)
    assert (float(found[0]), float(found[-1])) == (pytest.approx(0.3), pytest.approx(0.895))
    for q in (0.1, 0.5, 0.9):
        assert float(found.quantile(q)) == pytest.approx(float(kept.quantile(q)), abs=1e-3)


def test_phases_take_turns_and_each_has_its_steps_and_times(adapter: SpyAdapter) -> None:
    method: Any = toy_method("phased_dmd", adapter, mean=-0.5, generator_update_interval=2)
    boundary = (0.9 + 0.75) / 2
    assert (method.boundary, method.above) == (pytest.approx(boundary), 2)
    for step in range(8):
        adapter.calls.clear()
        losses = list(method.losses(analytic_batch(adapter, 4), step))
        high = step // 2 % 2 == 0
        assert len(losses) == (2 if step % 2 == 0 else 1)
        scored = [call.t for call in adapter.calls if call.network is method.bundle["critic"].network]
        assert all(bool(((t > boundary) == high).all()) for t in scored)
        assert all(float(t.min()) >= boundary + 0.02 - 1e-6 for t in scored if high)
        rolled = [float(call.t[0]) for call in adapter.calls if call.network is method.bundle["student"].network]
        assert rolled[0] == 1.0
        assert (rolled[-1] > boundary) == high


def test_the_low_phase_can_start_from_the_teachers_own_flow(adapter: SpyAdapter) -> None:
    method: Any = toy_method("phased_dmd", adapter, experts="low", teacher_start_steps=3)
    list(method.losses(analytic_batch(adapter, 4), 1))
    student = [float(call.t[0]) for call in adapter.calls if call.network is method.bundle["student"].network]
    teacher = [float(call.t[0]) for call in adapter.calls if call.network is method.bundle["teacher"].network][:3]
    assert student[0] == 0.75
    assert teacher == pytest.approx([1.0, 1 - 0.25 / 3, 1 - 0.5 / 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": 0.3}, "no step is low of the boundary 0.3"),
        ({"experts": "high", "boundary": 0.97}, r"score_time_range \[0.02, 0.98\] holds no time for the phase high"),
        ({"experts": "low", "score_time_range": (0.9, 0.98)}, "holds no time for the phase low"),
    ],
)
def test_a_phase_without_steps_or_times_is_refused(adapter: SpyAdapter, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_method("phased_dmd", adapter, **options)
