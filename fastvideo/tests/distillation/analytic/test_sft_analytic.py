"""SFT against closed forms (Gaussian data, exact velocity)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation import noise
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.methods.fine_tuning.sft import SFTConfig, SFTMethod, gaussian_weight
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch, Condition
from fastvideo.tests.distillation.toys import (
    LADDER,
    MEAN,
    STD,
    SpyAdapter,
    analytic_batch,
    gaussian,
    moments,
    spy,
    train,
)

BIG = (1, 1, 32, 32)
KS_BOUND = 1.95
"""Kolmogorov-Smirnov statistic times sqrt(n) that chance exceeds once in a thousand."""


def sft(adapter: SpyAdapter, mean: float = MEAN, std: float = STD, **options: Any) -> SFTMethod:
    """SFT of a denoiser that starts at N(mean, std^2)."""
    student = RoleHandle("student", adapter, gaussian(adapter, "denoiser", mean, std), trainable=True)
    return SFTMethod(SFTConfig(**options), ModelBundle([student]), LADDER, RandomStreams(3))


def kolmogorov_smirnov(uniform: Tensor) -> float:
    """Largest gap between the empirical distribution and the uniform one, times sqrt(n)."""
    ordered = uniform.double().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((ordered - steps).abs().max()) * math.sqrt(len(ordered))


@pytest.mark.parametrize(("t", "expected"), [(0.35, 0.8417), (0.9, 0.16 / 0.8116)])
def test_the_loss_of_the_exact_velocity_is_the_conditional_variance(t: float, expected: float) -> None:
    assert STD**2 / ((1 - t) ** 2 * STD**2 + t**2) == pytest.approx(expected, abs=5e-5)
    adapter = spy(BIG)
    (loss,) = sft(adapter, time_range=(t, t), caption_dropout=0.0).losses(analytic_batch(adapter, 400), 0)
    assert loss.role == "student"
    assert float(loss.value.detach()) == pytest.approx(expected, rel=0.01)


def test_the_gradient_on_the_output_is_twice_the_error_over_the_number_of_elements(adapter: SpyAdapter) -> None:
    method, batch = sft(adapter, mean=-0.5, std=1.2), analytic_batch(adapter, 8)
    (loss,) = method.losses(batch, 0)
    loss.value.backward()
    (call,) = adapter.calls
    assert batch.x0 is not None
    t = call.t.view(-1, 1, 1, 1, 1)
    eps = (call.x_t - (1 - t) * batch.x0) / t
    expected = 2 * (call.output - (eps - batch.x0)) / call.output.numel()
    torch.testing.assert_close(call.output.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_every_sample_has_a_time_of_its_own(adapter: SpyAdapter) -> None:
    list(sft(adapter).losses(analytic_batch(adapter, 64), 0))
    assert adapter.calls[0].t.dtype == torch.float32
    assert len(adapter.calls[0].t.unique()) == 64


def test_the_error_in_x0_is_t_squared_times_the_error_in_velocity(generator: torch.Generator) -> None:
    x0, eps, u = (torch.randn((6, 1, 2, 3, 3), generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.05, 1.0, 6, dtype=torch.float64)
    in_x0 = noise.velocity_to_x0(noise.add_noise(x0, eps, t), u, t) - x0
    in_u = u - noise.velocity_target(x0, eps)
    ratio = in_x0.square().mean((1, 2, 3, 4)) / in_u.square().mean((1, 2, 3, 4))
    torch.testing.assert_close(ratio, t**2)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_uniform_times_are_shifted(shift: float, adapter: SpyAdapter) -> None:
    t = sft(adapter, time_density="uniform", time_shift=shift, time_range=(0, 1)).times(100_000)
    cumulative = t / (shift - (shift - 1) * t)  # integral of shift / (shift - (shift - 1) t)^2
    assert kolmogorov_smirnov(cumulative) < KS_BOUND


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_times_move_by_the_logarithm_of_the_shift(shift: float, adapter: SpyAdapter) -> None:
    t = sft(adapter, time_density="logit_normal", time_shift=shift, time_range=(0, 1)).times(100_000)
    logit = t.double().logit() - math.log(shift)
    assert kolmogorov_smirnov(torch.special.ndtr(logit)) < KS_BOUND


def test_times_are_clamped_after_the_shift(adapter: SpyAdapter) -> None:
    t = sft(adapter, time_density="uniform", time_shift=5.0, time_range=(0.4, 0.6)).times(2000)
    assert float(t.min()) == pytest.approx(0.4)
    assert float(t.max()) == pytest.approx(0.6)
    assert (t == t.min()).float().mean() == pytest.approx(0.4 / (5 - 4 * 0.4), abs=0.03)


@pytest.mark.parametrize(("mean", "std"), [(0.8, 0.5), (-1.1, 2.0)])
def test_logit_normal_times_have_the_given_mean_and_scale(mean: float, std: float, adapter: SpyAdapter) -> None:
    t = sft(adapter, time_shift=1.0, time_range=(0, 1), logit_mean=mean, logit_std=std).times(100_000)
    assert kolmogorov_smirnov(torch.special.ndtr((t.double().logit() - mean) / std)) < KS_BOUND


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_times_follow_the_published_density(scale: float, adapter: SpyAdapter) -> None:
    """Against a numerical inverse of the published map, which falls from 1 to 0 as the uniform number rises."""
    t = sft(adapter, time_density="mode", mode_scale=scale, time_shift=1.0, time_range=(0, 1)).times(100_000)
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    published = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert published.diff().max() < 1e-9
    position = torch.searchsorted(published.flip(0), t.double()).clamp(max=len(u) - 1)
    assert kolmogorov_smirnov(1 - u.flip(0)[position]) < KS_BOUND


def test_the_middle_is_what_mode_and_gaussian_favour(adapter: SpyAdapter) -> None:
    middle = [
        (t - 0.5).abs().lt(0.2).float().mean()
        for t in (sft(adapter, time_density=d, time_shift=1.0).times(20_000) for d in ("uniform", "mode"))
    ]
    assert middle[1] > middle[0] + 0.1
    assert gaussian_weight(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.0, 1.5799, 0.0], abs=1e-3)


@pytest.mark.parametrize("weighting", ["gaussian", "beta08"])
def test_a_weight_has_mean_one_over_uniform_times(weighting: str, adapter: SpyAdapter) -> None:
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert float(sft(adapter, weighting=weighting).weight(t).mean()) == pytest.approx(1.0, abs=1e-4)


def test_min_snr_is_the_clipped_weight_of_the_loss_in_x0(adapter: SpyAdapter) -> None:
    t = torch.tensor([0.1, 0.25, 0.3, 0.5, 0.9], dtype=torch.float64)
    in_x0 = ((1 - t) ** 2 / t**2).clamp(max=5.0)
    torch.testing.assert_close(sft(adapter, weighting="min_snr").weight(t), in_x0 * t**2)
    assert float(sft(adapter, weighting="min_snr", min_snr_gamma=1.0).weight(t)[0]) == pytest.approx(0.01)


@pytest.mark.parametrize("weighting", ["none", "gaussian", "beta08", "min_snr"])
def test_every_sample_is_weighted_at_its_own_time(weighting: str, adapter: SpyAdapter) -> None:
    method, batch = sft(adapter, mean=-0.5, std=1.2, weighting=weighting), analytic_batch(adapter, 8)
    (loss,) = method.losses(batch, 0)
    loss.value.backward()
    (call,) = adapter.calls
    assert batch.x0 is not None
    t = call.t.view(-1, 1, 1, 1, 1)
    eps = (call.x_t - (1 - t) * batch.x0) / t
    expected = 2 * method.weight(t) * (call.output - (eps - batch.x0)) / call.output.numel()
    torch.testing.assert_close(call.output.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_two_parameter_student_reaches_the_truth() -> None:
    adapter = spy((1, 1, 1, 16))
    method = sft(adapter, mean=-0.5, std=1.2, time_shift=1.0, caption_dropout=0.0)
    train(method, lambda step: analytic_batch(adapter, 64, seed=step), 1500, {"student": 0.02})
    assert moments(method.bundle["student"]) == pytest.approx((MEAN, STD), abs=0.02)


def dropped_share(adapter: SpyAdapter, dropout: float) -> float:
    """Share of 4000 captions that the network did not see."""
    list(sft(adapter, caption_dropout=dropout).losses(analytic_batch(adapter, 4000, captions=("2",) * 4000), 0))
    seen = adapter.calls[-1].condition.of("analytic")["shift"]
    assert set(seen.tolist()) <= {0.0, 2.0}
    return float((seen == 0.0).float().mean())


def test_captions_are_dropped_always_never_or_by_the_given_share(adapter: SpyAdapter) -> None:
    assert dropped_share(adapter, 1.0) == 1.0
    assert dropped_share(adapter, 0.0) == 0.0
    assert dropped_share(adapter, 0.25) == pytest.approx(0.25, abs=0.03)


def test_all_tensors_of_a_condition_are_dropped_together(adapter: SpyAdapter) -> None:
    keep = torch.tensor([True, False, True])
    full = Condition({"one": {"a": torch.ones(3, 2)}, "other": {"b": torch.ones(3)}})
    null = Condition({"one": {"a": torch.zeros(3, 2)}, "other": {"b": torch.zeros(3)}})
    found = without_captions(Batch((3, 1, 1, 1, 1), full, null), keep).tensors
    assert found["one"]["a"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert found["other"]["b"].tolist() == [1, 0, 1]
