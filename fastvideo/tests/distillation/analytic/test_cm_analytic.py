"""Consistency models against closed forms: a Gaussian's flow map is exact, so a step's error is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.consistency_model.cm import CMConfig, CMMethod
from fastvideo.distillation.methods.consistency_model.discrete import lower_level, sample_distances, step_weights
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch, Given
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


def cm(
    adapter: SpyAdapter,
    mean: float = MEAN,
    std: float = STD,
    *,
    teacher: bool = True,
    cls: type[CMMethod] = CMMethod,
    **options: Any,
) -> CMMethod:
    """A consistency model whose student is the exact function of N(mean, std^2)."""
    handles = [RoleHandle("student", adapter, gaussian(adapter, "consistency", mean, std), trainable=True)]
    handles += [RoleHandle("teacher", adapter, gaussian(adapter, "denoiser"))] if teacher else []
    return cls(CMConfig(**{"teacher_guidance": 1.0, **options}), ModelBundle(handles), LADDER, RandomStreams(3))


class ExactStep(CMMethod):
    """The teacher's step is its flow map: no error of the solver is left."""

    def teacher_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        t, r = (time.view(-1, 1, 1, 1, 1) for time in (t, r))
        v_t, v_r = ((1 - time) ** 2 * STD**2 + time**2 for time in (t, r))
        return (1 - r) * MEAN + (v_r / v_t).sqrt() * (x_t - (1 - t) * MEAN)


class DoubleStep(ExactStep):
    """Times in float64, for figures below what float32 resolves."""

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        sigma = self.noise_levels(count)
        lower = lower_level(sigma, self.ratio)
        return sigma / (1 + sigma), lower / (1 + lower)


class FixedRatio(CMMethod):
    """A ratio that no stage has."""

    fixed = 0.0

    @property
    def ratio(self) -> float:
        return self.fixed


def wide(sigma: float) -> dict[str, Any]:
    """Every sample at one noise level."""
    return {"sigma_range": (sigma, sigma)}


def student_gradient(method: CMMethod, batch: Batch) -> Tensor:
    """Gradient with respect to the student's mean and log standard deviation."""
    method.student.network.zero_grad()
    (loss,) = method.losses(batch, 0)
    loss.value.backward()
    network = method.student.network
    return torch.stack([network.mean.grad, network.log_std.grad]).double()


@pytest.mark.parametrize(
    ("ratio", "sigma", "expected"), [(0.5, 1.0, 0.0), (0.5, 10.0, 4.99818), (0.999, 1.0, 0.99685), (0.0, 7.0, 0.0)]
)
def test_the_lower_level_has_the_published_values(ratio: float, sigma: float, expected: float) -> None:
    found = lower_level(torch.tensor([sigma], dtype=torch.float64), ratio)
    assert float(found) == pytest.approx(expected, abs=2e-5)


def test_the_lower_level_is_never_the_upper_one() -> None:
    sigma = torch.logspace(-3, 3, 200, dtype=torch.float64)
    assert (sigma - lower_level(sigma, 1 - 1e-15)).min() > 0.9e-6


def test_with_the_exact_function_and_an_exact_step_there_is_no_loss(adapter: SpyAdapter) -> None:
    """The constant of the metric is not in it, so that the distance itself is seen."""
    method = cm(adapter, cls=DoubleStep, ratio_base=16.0, metric="squared", weighting="none")
    for handle in method.bundle:
        handle.network.double()
    with torch.no_grad():
        method.student.network.mean.fill_(MEAN)
        method.student.network.log_std.fill_(math.log(STD))
    batch = analytic_batch(adapter, 64)
    assert batch.x0 is not None
    # r = 0 takes the data itself, which is not the end of this noise's flow: levels that reach it are left out.
    method.config = method.config.model_copy(update={"sigma_range": (0.5, 80.0)})
    (loss,) = method.losses(replace(batch, x0=batch.x0.double()), 0)
    assert float(loss.value.detach()) < 1e-12


def test_at_ratio_zero_it_is_denoising() -> None:
    """r = 0: the target is the data, so the best student is the posterior mean, with slope alpha s^2 / v_t."""
    adapter = spy((1, 1, 16, 16))
    method = cm(adapter, teacher=False, cls=FixedRatio, metric="squared", weighting="none")
    batch = analytic_batch(adapter, 32)
    (loss,) = method.losses(batch, 0)
    loss.value.backward()
    target_call, call = adapter.calls
    assert batch.x0 is not None
    t = call.t.view(-1, 1, 1, 1, 1)
    residual = call.x_t - t * call.output - batch.x0
    torch.testing.assert_close(call.output.grad, (-2 * t * residual / len(batch)).detach(), rtol=1e-4, atol=1e-6)
    assert (target_call.t == 0).all()


def test_in_distillation_too_the_target_at_zero_is_the_data() -> None:
    """At sigma = 1 and ratio 0.5 the lower level is 0; the teacher's step is taken and not used."""
    adapter = spy((1, 1, 8, 8))
    batch = analytic_batch(adapter, 16)
    assert batch.x0 is not None
    (loss,) = cm(adapter, metric="squared", weighting="none", **wide(1.0)).losses(batch, 0)
    call = adapter.calls[-1]
    assert (adapter.calls[1].t == 0).all()
    x0 = call.x_t - call.t.view(-1, 1, 1, 1, 1) * call.output
    expected = (x0 - batch.x0).square().sum(dim=(1, 2, 3, 4)).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_target_carries_no_gradient_and_the_calls_are_as_accounted(adapter: SpyAdapter) -> None:
    for options, student, teacher in (
        ({"teacher": False}, "ng", ""),
        ({}, "ng", "n"),
        ({"teacher_guidance": 3.0}, "ng", "nn"),
        ({"solver": "heun"}, "ng", "nn"),
        ({"solver": "heun", "teacher_guidance": 3.0}, "ng", "nnnn"),
    ):
        adapter.calls.clear()
        method = cm(adapter, -0.5, 1.2, ratio_base=100.0, **options)
        list(method.losses(analytic_batch(adapter, 4), 0))
        assert adapter.grad_modes(method.student) == student
        teachers = [handle for handle in method.bundle if handle.name == "teacher"]
        assert "".join(adapter.grad_modes(handle) for handle in teachers) == teacher


def test_the_pair_shares_data_and_noise_in_training_and_the_flow_in_distillation(adapter: SpyAdapter) -> None:
    batch = analytic_batch(adapter, 6)
    assert batch.x0 is not None
    method = cm(adapter, teacher=False, ratio_base=100.0)
    list(method.losses(batch, 0))
    low, high = adapter.calls
    noises = [(c.x_t - (1 - c.t.view(-1, 1, 1, 1, 1)) * batch.x0) / c.t.view(-1, 1, 1, 1, 1) for c in (low, high)]
    assert (low.t < high.t).all()
    assert low.t.dtype == torch.float32
    torch.testing.assert_close(*noises, rtol=1e-2, atol=1e-2)
    adapter.calls.clear()
    method = cm(adapter, ratio_base=100.0)
    list(method.losses(batch, 0))
    of_teacher, low, high = adapter.calls
    assert torch.equal(of_teacher.x_t, high.x_t)
    span = (high.t - low.t).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(low.x_t, high.x_t - span * of_teacher.output)


def test_the_euler_step_is_guided_and_heun_averages_both_ends(adapter: SpyAdapter) -> None:
    batch, t, r = analytic_batch(adapter, 3, captions=("0.5",) * 3), torch.tensor([0.6] * 3), torch.tensor([0.5] * 3)
    x_t = torch.randn(3, 1, 1, 4, 4)
    v = (1 - 0.6) ** 2 * STD**2 + 0.6**2

    def u(x: Tensor, time: float, mean: float) -> Tensor:
        variance = (1 - time) ** 2 * STD**2 + time**2
        return -mean + (time - (1 - time) * STD**2) / variance * (x - (1 - time) * mean)

    def guided(x: Tensor, time: float) -> Tensor:
        return u(x, time, MEAN) + 3.0 * (u(x, time, MEAN + 0.5) - u(x, time, MEAN))

    assert v > 0
    euler = cm(adapter, teacher_guidance=3.0).teacher_step(x_t, t, r, batch)
    torch.testing.assert_close(euler, x_t - 0.1 * guided(x_t, 0.6), rtol=1e-4, atol=1e-5)
    heun = cm(adapter, teacher_guidance=3.0, solver="heun").teacher_step(x_t, t, r, batch)
    expected = x_t - 0.05 * (guided(x_t, 0.6) + guided(euler, 0.5))
    torch.testing.assert_close(heun, expected, rtol=1e-4, atol=1e-5)


def test_stages_begin_at_exact_counts_and_survive_a_restart(adapter: SpyAdapter) -> None:
    method, batch = cm(adapter, samples_per_stage=8, ratio_base=2.0, max_ratio=0.9), analytic_batch(adapter, 4)
    ratios = []
    for step in range(8):
        ratios.append(method.ratio)
        list(method.losses(batch, step))
        again = cm(adapter, samples_per_stage=8, ratio_base=2.0, max_ratio=0.9)
        again.load_state_dict(method.state_dict())
        assert again.ratio == method.ratio
    assert ratios == [0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 0.9, 0.9]
    assert method.state_dict() == {"samples_seen": 32}


def test_weights_and_distances_are_as_stated() -> None:
    sigma, lower = torch.tensor([0.5, 4.0], dtype=torch.float64), torch.tensor([0.25, 3.0], dtype=torch.float64)
    t, r = sigma / (1 + sigma), lower / (1 + lower)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    for name, expected in {
        "inverse_step": 1 / (sigma - lower),
        "inverse_root_step": 1 / (sigma - lower).sqrt(),
        "inverse_c_out": 1 / c_out,
        "inverse_c_out_squared": 1 / c_out**2,
        "inverse_square": 1 / sigma**2,
        "none": torch.ones(2, dtype=torch.float64),
    }.items():
        torch.testing.assert_close(step_weights(t, r, name, 0.5), expected)
    a, b = torch.zeros(2, 1, 2, 2, 1), torch.zeros(2, 1, 2, 2, 1)
    a[0, :, 0], a[1, :, 1] = 3.0, 4.0
    assert sample_distances(a, b, None, None).tolist() == [18.0, 32.0]
    assert sample_distances(a, b, None, 1e-8).tolist() == pytest.approx([math.sqrt(18), math.sqrt(32)], rel=1e-6)
    assert sample_distances(a, b, None, 2.0).tolist() == pytest.approx([math.sqrt(22) - 2, 4.0])
    given = Given(torch.tensor([[True, False], [True, False]]), b)
    assert sample_distances(a, b, given, None).tolist() == [0.0, 32.0], "what is free alone"


def test_noise_levels_are_log_normal_then_clamped(adapter: SpyAdapter) -> None:
    sigma = cm(adapter).noise_levels(50_000)
    assert float(sigma.log().median()) == pytest.approx(-1.1, abs=0.03)
    assert float(sigma.min()) == pytest.approx(0.002)
    assert float(sigma.max()) == pytest.approx(80.0)
    assert float((sigma < math.exp(-3.1)).double().mean()) == pytest.approx(0.1587, abs=0.01)


def test_a_two_parameter_student_reaches_the_truth_without_a_teacher() -> None:
    adapter = spy((1, 1, 1, 16))
    method = cm(adapter, -0.5, 1.2, teacher=False, ratio_base=64.0, metric="squared", log_sigma_mean=0.0)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 400, {"student": 0.04}, final_rate=0.05)
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.03)
