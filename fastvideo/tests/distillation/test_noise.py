"""The conversions are exact: identities hold to float64 rounding, against closed forms of a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvideo.distillation import interpolant, noise, tangent
from fastvideo.distillation.interpolant import Interpolant
from fastvideo.tests.distillation.toys import MEAN, STD

TIMES = torch.tensor([0.001, 0.2, 0.5, 0.8333, 0.98], dtype=torch.float64)
INTERPOLANTS = {
    "flow": Interpolant.rectified_flow(TIMES),
    "vp": Interpolant.variance_preserving(interpolant.flow_time_to_variance_preserving(TIMES)),
    "edm": Interpolant.edm(TIMES / (1 - TIMES)),
    "trigflow": Interpolant.trigflow(interpolant.flow_time_to_trigflow(TIMES)),
}
every_interpolant = pytest.mark.parametrize("name", INTERPOLANTS)
unit_times = st.floats(0.0, 1.0, allow_subnormal=False)
shifts = st.floats(0.1, 20.0)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clean latents and noise, ``[5, 2, 3, 4, 6]`` in float64."""
    shape = (len(TIMES), 2, 3, 4, 6)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return MEAN + STD * x0, eps


def gaussian_velocity(x_t: Tensor, t: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """``E[noise - x0 | x_t]`` of N(mean, std^2), from the joint Gaussian of (x0, noise, x_t)."""
    alpha, sigma = 1 - t.view(-1, 1, 1, 1, 1), t.view(-1, 1, 1, 1, 1)
    gain = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return sigma * gain - (mean + alpha * std**2 * gain)


def test_noise_is_added_as_one_minus_t_data_plus_t_noise(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    x_t = noise.add_noise(x0, eps, TIMES)
    close(x_t[2], 0.5 * x0[2] + 0.5 * eps[2])
    close(x_t[1], 0.8 * x0[1] + 0.2 * eps[1])


def test_the_ends_of_the_schedule_are_data_and_noise(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    assert torch.equal(noise.add_noise(x0, eps, torch.zeros(5)), x0)
    assert torch.equal(noise.add_noise(x0, eps, torch.ones(5)), eps)


def test_velocity_gives_back_data_noise_and_itself(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    x_t, u = noise.add_noise(x0, eps, TIMES), noise.velocity_target(x0, eps)
    close(noise.velocity_to_x0(x_t, u, TIMES), x0)
    close(interpolant.velocity_to_noise(x_t, u, TIMES), eps)
    close(noise.x0_to_velocity(x_t, x0, TIMES), u, 1e-8)


def test_velocity_is_the_time_derivative_of_the_path(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    step = 1e-6
    slope = (noise.add_noise(x0, eps, TIMES + step) - noise.add_noise(x0, eps, TIMES - step)) / (2 * step)
    close(slope, noise.velocity_target(x0, eps), 1e-7)


def test_x0_to_velocity_is_finite_at_time_zero(pair: tuple[Tensor, Tensor]) -> None:
    assert noise.x0_to_velocity(pair[0], pair[0], torch.zeros(5)).abs().max() == 0


def test_score_of_a_gaussian(pair: tuple[Tensor, Tensor]) -> None:
    x_t = noise.add_noise(*pair, TIMES)
    t = TIMES.view(-1, 1, 1, 1, 1)
    expected = -(x_t - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    close(interpolant.velocity_to_score(x_t, gaussian_velocity(x_t, TIMES), TIMES), expected, 1e-8)


def test_difference_of_denoisers_is_the_scaled_difference_of_scores(pair: tuple[Tensor, Tensor]) -> None:
    x_t = noise.add_noise(*pair, TIMES)
    u_q, u_p = gaussian_velocity(x_t, TIMES, mean=-0.3, std=0.9), gaussian_velocity(x_t, TIMES)
    denoisers = noise.velocity_to_x0(x_t, u_q, TIMES) - noise.velocity_to_x0(x_t, u_p, TIMES)
    scores = interpolant.velocity_to_score(x_t, u_q, TIMES) - interpolant.velocity_to_score(x_t, u_p, TIMES)
    t = TIMES.view(-1, 1, 1, 1, 1)
    close(denoisers, t**2 / (1 - t) * scores, 1e-8)


@every_interpolant
def test_flow_time_matches_the_signal_to_noise_ratio(name: str) -> None:
    close(INTERPOLANTS[name].flow_time, TIMES)


@every_interpolant
def test_to_flow_is_the_same_noisy_sample_on_the_flow_schedule(name: str, pair: tuple[Tensor, Tensor]) -> None:
    way, (x0, eps) = INTERPOLANTS[name], pair
    x = noise.expand_time(way.alpha, x0) * x0 + noise.expand_time(way.sigma, x0) * eps
    close(way.to_flow(x), noise.add_noise(x0, eps, TIMES))
    close(way.from_flow(way.to_flow(x)), x)


@every_interpolant
def test_clean_and_noise_predictions_survive_the_change_of_schedule(name: str, pair: tuple[Tensor, Tensor]) -> None:
    way, (x0, eps) = INTERPOLANTS[name], pair
    x = way.from_flow(noise.add_noise(x0, eps, TIMES))
    close(way.x0_from_noise(x, eps), x0, 1e-8)
    close(way.noise_from_x0(x, x0), eps, 1e-8)


@every_interpolant
def test_v_prediction_converts_exactly(name: str, pair: tuple[Tensor, Tensor]) -> None:
    way, (x0, eps) = INTERPOLANTS[name], pair
    x = way.from_flow(noise.add_noise(x0, eps, TIMES))
    v = noise.expand_time(way.alpha, x0) * eps - noise.expand_time(way.sigma, x0) * x0
    close(way.x0_from_v(x, v), x0)
    close(way.noise_from_v(x, v), eps)


@every_interpolant
def test_v_of_a_gaussian_becomes_its_flow_velocity(name: str, pair: tuple[Tensor, Tensor]) -> None:
    way = INTERPOLANTS[name]
    alpha, sigma = (noise.expand_time(c, pair[0]) for c in (way.alpha, way.sigma))
    x = alpha * pair[0] + sigma * pair[1]
    gain = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    v = alpha * sigma * gain - sigma * (MEAN + alpha * STD**2 * gain)
    x_flow = way.to_flow(x)
    close(way.flow_velocity_from_v(x, v), gaussian_velocity(x_flow, way.flow_time), 1e-9)


def test_trigflow_angle_runs_from_zero_to_a_right_angle() -> None:
    ends = interpolant.flow_time_to_trigflow(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    close(ends, torch.tensor([0.0, math.pi / 4, math.pi / 2], dtype=torch.float64))


def test_trigflow_velocity_of_a_gaussian_is_the_slope_of_its_own_flow(pair: tuple[Tensor, Tensor]) -> None:
    angle = torch.tensor([0.0, 0.3, 0.8, 1.4, math.pi / 2], dtype=torch.float64)
    cos, sin = (value.view(-1, 1, 1, 1, 1) for value in (angle.cos(), angle.sin()))
    x, way = cos * pair[0] + sin * pair[1], Interpolant.trigflow(angle)
    found = tangent.trigflow_velocity(x, gaussian_velocity(way.to_flow(x), way.flow_time), angle)
    variance = cos**2 * STD**2 + sin**2
    close(found, -sin * MEAN + sin * cos * (1 - STD**2) / variance * (x - cos * MEAN), 1e-12)


def rotated(x: Tensor, velocity: Tensor, by: Tensor) -> Tensor:
    """``x`` moved by the angle ``-by`` along a TrigFlow velocity; by the whole angle it is ``x0``."""
    return noise.expand_time(by.cos(), x) * x - noise.expand_time(by.sin(), x) * velocity


def test_trigflow_velocity_of_a_pair_rotates_it_to_any_angle(pair: tuple[Tensor, Tensor]) -> None:
    angle = interpolant.flow_time_to_trigflow(TIMES)
    x0, eps = pair
    way = Interpolant.trigflow(angle)
    x = way.from_flow(noise.add_noise(x0, eps, TIMES))
    velocity = tangent.trigflow_velocity(x, noise.velocity_target(x0, eps), angle)
    close(rotated(x, velocity, angle), x0)
    later = Interpolant.trigflow(angle - 0.1)
    moved = noise.expand_time(later.alpha, x) * x0 + noise.expand_time(later.sigma, x) * eps
    close(rotated(x, velocity, torch.full_like(angle, 0.1)), moved)


def test_per_frame_times_act_on_their_frame_alone(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    t = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64).expand(5, 3)
    for function in (noise.add_noise, noise.velocity_to_x0, interpolant.velocity_to_noise, noise.x0_to_velocity):
        whole = function(x0, eps, t)
        for frame in range(3):
            alone = function(x0[:, :, [frame]], eps[:, :, [frame]], t[:, frame])
            assert torch.equal(whole[:, :, [frame]], alone)


def test_constant_per_frame_times_equal_a_time_per_sample(pair: tuple[Tensor, Tensor]) -> None:
    per_frame = TIMES[:, None].expand(5, 3)
    assert torch.equal(noise.add_noise(*pair, per_frame), noise.add_noise(*pair, TIMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_low_precision_time_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="time must be float32 or float64"):
        noise.add_noise(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2), torch.ones(1).to(dtype))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.5])
def test_guidance_commutes_with_every_conversion(guidance: float, pair: tuple[Tensor, Tensor]) -> None:
    x_t, eps = noise.add_noise(*pair, TIMES), pair[1]
    u_u, u_c = eps.roll(1, 0), eps.roll(2, 0)
    guided = noise.guide(u_u, u_c, guidance)
    for convert in (noise.velocity_to_x0, interpolant.velocity_to_noise, interpolant.velocity_to_score):
        after = noise.guide(convert(x_t, u_u, TIMES), convert(x_t, u_c, TIMES), guidance)
        close(convert(x_t, guided, TIMES), after, 1e-8)


def test_guidance_is_in_the_standard_convention() -> None:
    unconditional, conditional = torch.tensor([1.0]), torch.tensor([3.0])
    found = [float(noise.guide(unconditional, conditional, g)) for g in (0.0, 1.0, 4.5)]
    assert found == [1.0, 3.0, 10.0]
    extra = conditional + 3.5 * (conditional - unconditional)
    assert noise.guide(unconditional, conditional, 4.5) == extra


@given(unit_times, unit_times, shifts)
def test_shift_is_monotone_and_keeps_the_interval(one: float, other: float, shift: float) -> None:
    low, high = noise.shift_time(min(one, other), shift), noise.shift_time(max(one, other), shift)
    assert 0.0 <= low <= high <= 1.0 + 1e-15


@given(shifts)
def test_shift_fixes_both_ends(shift: float) -> None:
    assert noise.shift_time(0.0, shift) == 0.0
    assert noise.shift_time(1.0, shift) == pytest.approx(1.0, abs=1e-15)


@given(unit_times, shifts, shifts)
def test_shifts_compose_by_multiplying(t: float, one: float, other: float) -> None:
    assert noise.shift_time(noise.shift_time(t, one), other) == pytest.approx(noise.shift_time(t, one * other))
    assert noise.shift_time(noise.shift_time(t, one), 1 / one) == pytest.approx(t, abs=1e-12)


@given(st.floats(0.01, 0.99), shifts)
def test_shift_adds_its_logarithm_to_the_logit(t: float, shift: float) -> None:
    moved = noise.shift_time(t, shift)
    assert math.log(moved / (1 - moved)) == pytest.approx(math.log(t / (1 - t)) + math.log(shift), abs=1e-9)


def test_shift_acts_on_tensors_as_on_numbers() -> None:
    assert noise.shift_time(TIMES, 5.0).tolist() == [noise.shift_time(t, 5.0) for t in TIMES.tolist()]
