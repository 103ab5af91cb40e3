"""sCM against closed forms: tangents in float64, fixed points, convergence, samplers, network calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.methods.consistency_model.scm import LossWeight, SCMConfig, SCMMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.tangent import trig_field
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.exact import batch_of, bundle_of, column, draw, exact
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, SpyAdapter, analytic_batch, gaussian, moments, train

ANGLE = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64)
COS, SIN = column(ANGLE.cos()), column(ANGLE.sin())
X0, NOISE = MEAN + STD * draw(4, 1, 1, 4, 4), draw(4, 1, 1, 4, 4, seed=6)
X = COS * X0 + SIN * NOISE
VARIANCE = COS**2 * STD**2 + SIN**2


def scm(
    adapter: SpyAdapter,
    student: torch.nn.Module | None = None,
    teacher: torch.nn.Module | None = None,
    *,
    seed: int = 3,
    **options: Any,
) -> SCMMethod:
    """sCM with the exact float64 consistency function as student; without a teacher it trains on data."""
    trained = {"student": student or exact(adapter, "consistency"), "loss_weight": LossWeight()}
    bundle = bundle_of(adapter, trained, {"teacher": teacher} if teacher else {})
    return SCMMethod(SCMConfig(**{"teacher_guidance": 1.0, **options}), bundle, LADDER, RandomStreams(seed))


def tangent(method: SCMMethod, warmup: float = 1.0, x0: Tensor = X0, noise: Tensor = NOISE, **batch: Any) -> Tensor:
    """Before it is normalised."""
    return method.tangent_and_error(batch_of(x0, **batch), ANGLE, noise, warmup)[0].detach()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_the_tangent_of_a_diffusion_model_has_a_closed_form(adapter: SpyAdapter) -> None:
    method = scm(adapter, exact(adapter, "denoiser"), exact(adapter, "denoiser"))
    close(tangent(method), -COS * STD**2 * SIN * (X - COS * MEAN) / VARIANCE**2)


def test_the_tangent_of_the_exact_consistency_function_is_zero(adapter: SpyAdapter) -> None:
    close(tangent(scm(adapter, teacher=exact(adapter, "denoiser"))), torch.zeros_like(X))


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_tangent_is_the_derivative_of_the_consistency_function_along_the_flow(
    with_teacher: bool, adapter: SpyAdapter
) -> None:
    student, teacher = exact(adapter, "denoiser", -0.3, 0.9), exact(adapter, "denoiser")
    method = scm(adapter, student, teacher if with_teacher else None)
    condition = batch_of(X0).condition
    field = trig_field(lambda x, t: adapter.velocity(student, x, t, condition))

    def consistency(x: Tensor, angle: Tensor) -> Tensor:
        return column(angle.cos()) * x - column(angle.sin()) * field(x, angle)

    flow = COS * NOISE - SIN * X0
    if with_teacher:
        flow = -SIN * MEAN + SIN * COS * (1 - STD**2) / VARIANCE * (X - COS * MEAN)
    derivative = torch.func.jvp(consistency, (X, ANGLE), (flow, torch.ones_like(ANGLE)))[1]
    close(tangent(method) / COS, derivative.detach())


def test_before_warm_up_the_flow_is_regressed_and_the_teacher_itself_does_not_move(adapter: SpyAdapter) -> None:
    student = exact(adapter, "denoiser", -0.3, 0.9)
    flows = [-SIN * m + SIN * COS * (1 - s**2) / (COS**2 * s**2 + SIN**2) * (X - COS * m) for m, s in
             ((-0.3, 0.9), (MEAN, STD))]  # fmt: skip
    close(tangent(scm(adapter, student, exact(adapter, "denoiser")), 0.0), -(COS**2) * (flows[0] - flows[1]))
    method = scm(adapter, exact(adapter, "denoiser"), exact(adapter, "denoiser"))
    _, error = method.tangent_and_error(batch_of(X0), ANGLE, NOISE, 0.0)
    assert torch.count_nonzero(error) == 0
    error.sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in method.student.parameters() if p.grad is not None)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (25, 0.25), (100, 1.0), (1000, 1.0)])
def test_the_warm_up_counts_steps(step: int, share: float, adapter: SpyAdapter, monkeypatch: Any) -> None:
    method = scm(adapter, gaussian(adapter, "consistency"), gaussian(adapter, "denoiser"), tangent_warmup_steps=100)
    seen: list[float] = []
    original = method.tangent_and_error

    def watching(batch: Batch, angle: Tensor, noise: Tensor, warmup: float) -> tuple[Tensor, Tensor]:
        seen.append(warmup)
        return original(batch, angle, noise, warmup)

    monkeypatch.setattr(method, "tangent_and_error", watching)
    list(method.losses(analytic_batch(adapter, 2), step))
    assert seen == [share]


def test_a_distilled_tangent_depends_on_the_noisy_sample_alone_and_a_trained_one_on_its_data(
    adapter: SpyAdapter,
) -> None:
    student, teacher = exact(adapter, "denoiser", -0.3, 0.9), exact(adapter, "denoiser")
    other = X0 + 0.5
    noise = (X - COS * other) / SIN
    for found, same in ((scm(adapter, student, teacher), True), (scm(adapter, student), False)):
        assert torch.allclose(tangent(found), tangent(found, x0=other, noise=noise), rtol=0, atol=1e-9) == same


def test_central_differences_agree_to_their_step_squared_and_follow_the_teacher(adapter: SpyAdapter) -> None:
    """The student is right for N(MEAN, STD^2); the teacher is another Gaussian, and so are its directions."""
    networks = exact(adapter, "consistency"), exact(adapter, "denoiser", -0.2, 0.8)
    wanted = tangent(scm(adapter, *networks))
    errors = []
    for step in (2e-2, 1e-2):
        found = tangent(scm(adapter, *networks, jvp="central_difference", jvp_step=step))
        errors.append(float((found - wanted).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)
    assert errors[1] < 1e-4
    assert float((tangent(scm(adapter, networks[0])) - wanted).abs().max()) > 0.1, "the data's own direction is another"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_moves_the_flow_by_the_difference_of_the_means(guidance: float, adapter: SpyAdapter) -> None:
    """Equal stds: the guided teacher is the Gaussian whose mean is extrapolated, and its consistency function fits."""
    method = scm(
        adapter, exact(adapter, "consistency", MEAN + (guidance - 1) * 0.5), exact(adapter, "denoiser"),
        teacher_guidance=guidance,
    )  # fmt: skip
    close(tangent(method, caption=0.5), torch.zeros_like(X))


def test_the_gradient_on_the_student_is_the_normalised_tangent(adapter: SpyAdapter) -> None:
    method = scm(adapter, exact(adapter, "denoiser", -0.3, 0.9), exact(adapter, "denoiser"), tangent_constant=0.1)
    raw, error = method.tangent_and_error(batch_of(X0), ANGLE, NOISE, 1.0)
    raw = raw.detach()
    unit = raw / (raw.square().mean((1, 2, 3, 4), keepdim=True).sqrt() + 0.1)
    close(error.detach(), unit.square().mean((1, 2, 3, 4)))
    error.sum().backward()
    (call,) = [call for call in adapter.of(method.student) if call.with_grad]
    du = 1 / (COS + SIN)  # dF / du of the wrapper
    assert call.output.grad is not None
    close(call.output.grad, -2 * unit * du / 16)


def test_the_loss_is_weighted_by_the_prior_and_the_learned_weight(adapter: SpyAdapter) -> None:
    method = scm(adapter, gaussian(adapter, "consistency", 0.2), gaussian(adapter, "denoiser"))
    with torch.no_grad():
        method.weight.linear.bias.fill_(0.4)
    batch, angle = analytic_batch(adapter, 4), torch.tensor([0.2, 0.5, 1.0, 1.4])
    method.angles = lambda count: angle  # type: ignore[method-assign]
    student, weight = method.losses(batch, 10_000)
    noise = RandomStreams(3).normal(batch.shape)
    _, error = method.tangent_and_error(batch, angle, noise, 1.0)
    expected = (math.exp(0.4) / angle.tan() * error).mean()
    torch.testing.assert_close(student.value, expected)
    torch.testing.assert_close(weight.value, expected.detach() - 0.4)
    (slope,) = torch.autograd.grad(weight.value, method.weight.linear.bias)
    torch.testing.assert_close(slope[0], expected.detach() - 1, msg="it rests where the weighted error is 1")


def test_training_times_are_the_arctangent_of_a_log_normal(adapter: SpyAdapter) -> None:
    method = scm(adapter, log_sigma_mean=0.7, log_sigma_std=1.6)
    logs = method.angles(20_000).tan().log()
    assert float(logs.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.6, abs=0.03)
    assert float((logs < 0.7 + 1.6).float().mean()) == pytest.approx(0.8413, abs=0.01)


@pytest.mark.parametrize(
    ("options", "teacher", "student_calls", "teacher_calls"),
    [
        ({}, True, "ng", "n"),
        ({"teacher_guidance": 3.0}, True, "ng", "nn"),
        ({}, False, "ng", ""),
        ({"jvp": "central_difference"}, True, "nng", "n"),
    ],
)
def test_network_calls(
    options: dict[str, Any], teacher: bool, student_calls: str, teacher_calls: str, adapter: SpyAdapter
) -> None:
    frozen = gaussian(adapter, "denoiser") if teacher else None
    method = scm(adapter, gaussian(adapter, "consistency"), frozen, **options)
    for loss in method.losses(analytic_batch(adapter, 2), 0):
        loss.value.backward()
    assert adapter.grad_modes(method.student) == student_calls
    if teacher:
        assert adapter.grad_modes(method.bundle["teacher"]) == teacher_calls


@pytest.mark.nightly
@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_two_parameter_student_reaches_the_truth(with_teacher: bool, adapter: SpyAdapter) -> None:
    teacher = gaussian(adapter, "denoiser") if with_teacher else None
    method = scm(adapter, gaussian(adapter, "consistency", -0.5, 1.2), teacher, tangent_warmup_steps=1)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 500, {"student": 3e-2, "loss_weight": 1e-3})
    mean, std = moments(method.student)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02 if with_teacher else 0.03)


def test_the_exact_student_is_right_under_its_sampler_and_wrong_under_another(adapter: SpyAdapter) -> None:
    method, streams = scm(adapter, gaussian(adapter, "consistency")), RandomStreams(4)
    condition = adapter.conditioner.negative(5000)

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return method.student.velocity(x_t, t, condition)

    noise = streams.normal((5000, *adapter.codec.latent_shape))
    found = {kind: generate(kind, velocity, noise, LADDER.times, streams.normal_like) for kind in ("renoise", "euler")}
    assert SCMMethod.sampler == "renoise"
    assert float(found["renoise"].var()) == pytest.approx(STD**2, rel=0.02)
    assert abs(float(found["euler"].var()) / STD**2 - 1) > 0.2
