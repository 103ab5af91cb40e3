"""rCM against closed forms: both terms, the cadence, the random rollout, the critic's loss, fixed point and calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.interpolant import flow_time_to_trigflow
from fastvideo.distillation.methods.consistency_model.scm import LossWeight, SCMConfig, SCMMethod
from fastvideo.distillation.methods.distribution_matching.rcm import RCMConfig, RCMMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.tangent import consistency_tangent, sample_warmup_tangent
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.exact import batch_of, bundle_of, column, draw, exact
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, SpyAdapter, analytic_batch, gaussian, moments, train

ANGLE = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64)
X0, NOISE = MEAN + STD * draw(4, 1, 1, 4, 4), draw(4, 1, 1, 4, 4, seed=6)


def rcm(
    adapter: SpyAdapter,
    student: nn.Module | None = None,
    critic: nn.Module | None = None,
    seed: int = 3,
    **options: Any,
) -> RCMMethod:
    """rCM whose student and critic know the truth, unless others are given."""
    trained = {
        "student": student or gaussian(adapter, "consistency"),
        "critic": critic or gaussian(adapter, "denoiser"),
    }
    bundle = bundle_of(adapter, trained, {"teacher": gaussian(adapter, "denoiser")})
    defaults = {"teacher_guidance": 1.0, "consistency_steps": 0, "tangent_warmup_steps": 0}
    return RCMMethod(RCMConfig(**{**defaults, **options}), bundle, LADDER, RandomStreams(seed))


def in_double(adapter: SpyAdapter, method: RCMMethod, kind: str, mean: float, std: float) -> None:
    """Exact float64 student and teacher."""
    method.student.network, method.teacher.network = exact(adapter, kind, mean, std), exact(adapter, "denoiser")


@pytest.mark.parametrize("warmup", [0.0, 0.4, 1.0])
def test_the_consistency_term_is_that_of_scm(warmup: float, adapter: SpyAdapter) -> None:
    method = rcm(adapter)
    in_double(adapter, method, "denoiser", -0.3, 0.9)
    networks = {"student": exact(adapter, "denoiser", -0.3, 0.9), "loss_weight": LossWeight()}
    bundle = bundle_of(adapter, networks, {"teacher": exact(adapter, "denoiser")})
    scm = SCMMethod(SCMConfig(teacher_guidance=1.0), bundle, LADDER, RandomStreams(3))
    found = method.consistency_error(batch_of(X0), ANGLE, NOISE, warmup)
    wanted = scm.tangent_and_error(batch_of(X0), ANGLE, NOISE, warmup)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=1e-12)


def test_the_consistency_term_of_the_exact_student_is_zero(adapter: SpyAdapter) -> None:
    method = rcm(adapter)
    in_double(adapter, method, "consistency", MEAN, STD)
    tangent, _ = method.consistency_error(batch_of(X0), ANGLE, NOISE, 1.0)
    torch.testing.assert_close(tangent.detach(), torch.zeros_like(X0), rtol=0, atol=1e-10)


def test_both_warm_ups_end_in_the_same_tangent_and_the_published_one_keeps_the_derivative() -> None:
    x, prediction, flow, derivative = (draw(4, 1, 1, 2, 2, seed=seed) for seed in range(4))
    arguments = (x, ANGLE, prediction, flow, derivative)
    torch.testing.assert_close(sample_warmup_tangent(*arguments, 1.0), consistency_tangent(*arguments, 1.0))
    start = -column(ANGLE.cos()) * (prediction - flow)
    torch.testing.assert_close(sample_warmup_tangent(*arguments, 0.0), start - derivative)
    torch.testing.assert_close(consistency_tangent(*arguments, 0.0), start * column(ANGLE.cos()))


@pytest.mark.parametrize("form", ["both", "sample"])
def test_the_form_of_the_warm_up_is_the_configs(form: str, adapter: SpyAdapter) -> None:
    found = {}
    for name in ("both", form):
        method = rcm(adapter, tangent_warmup=name)
        in_double(adapter, method, "denoiser", -0.3, 0.9)
        found[name] = method.consistency_error(batch_of(X0), ANGLE, NOISE, 0.3)[0].detach()
    assert torch.equal(found["both"], found[form]) == (form == "both")


def test_the_tangents_warm_up_counts_all_steps_and_the_weight_scales_the_loss(adapter: SpyAdapter) -> None:
    method = rcm(adapter, tangent_warmup_steps=10, consistency_steps=4, consistency_weight=0.5)
    seen: list[float] = []

    def watching(batch: Batch, angle: Tensor, noise: Tensor, warmup: float) -> tuple[Tensor, Tensor]:
        seen.append(warmup)
        return noise, torch.full((len(batch),), 3.0, requires_grad=True)

    method.consistency_error = watching  # type: ignore[method-assign]
    batch = analytic_batch(adapter, 2)
    losses = [method.consistency_loss(batch, step) for step in (0, 5, 9, 10, 50)]
    assert seen == [0.0, 0.5, 0.9, 1.0, 1.0]
    assert [float(loss.value.detach()) for loss in losses] == [1.5] * 5


def test_the_student_trains_alone_at_first_and_then_once_in_each_interval(adapter: SpyAdapter) -> None:
    method = rcm(adapter, consistency_steps=3, generator_update_interval=5)
    shown = "".join(method.active_roles(step)[0][0] for step in range(15))
    assert shown == "sss" + "scccc" * 2 + "sc"
    assert all(len(method.active_roles(step)) == 1 for step in range(15))


def test_a_student_step_has_consistency_then_distribution_matching(adapter: SpyAdapter) -> None:
    method = rcm(adapter, consistency_steps=1, generator_update_interval=2)
    batch = analytic_batch(adapter, 2)
    metrics = [[set(loss.metrics) for loss in method.losses(batch, step)] for step in range(3)]
    assert metrics == [[{"tangent_rms"}], [{"tangent_rms"}, {"dmd_gradient_rms"}], [set()]]


def test_the_rollout_falls_from_pure_noise_by_one_more_call_each_turn(adapter: SpyAdapter) -> None:
    method = rcm(adapter, rollout_steps=4)
    batch = analytic_batch(adapter, 64)
    for turn, calls in ((0, 1), (1, 2), (3, 4), (4, 1), (6, 3)):
        adapter.calls.clear()
        method.rollout(batch, turn)
        assert adapter.grad_modes(method.student) == "n" * (calls - 1) + "g"
        times = [call.t for call in adapter.of(method.student)]
        assert bool((times[0] == 1.0).all())
        for earlier, later in itertools.pairwise(times):
            assert bool((later <= earlier).all())
            assert bool((later < earlier).any())
        if calls > 1:
            assert times[1].unique().numel() == len(batch), "a draw per sample"
            # tan of the angle is log-normal around exp(0.7), so the median draw is t = e^0.7 / (1 + e^0.7).
            assert float((times[1] < 0.6682).float().mean()) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_the_rollout_of_the_exact_student_is_the_truth(turn: int, adapter: SpyAdapter) -> None:
    with torch.no_grad():
        x0 = rcm(adapter).rollout(analytic_batch(adapter, 5000), turn)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.var()) == pytest.approx(STD**2, rel=0.02)


def test_the_critics_loss_is_velocity_matching_in_trigflow(adapter: SpyAdapter) -> None:
    """``|D - x0|^2 / sin^2`` of the clean estimate, sample by sample, at the angle of the drawn time."""
    method = rcm(adapter, critic=gaussian(adapter, "denoiser", -0.3, 0.9))
    x0, batch = torch.randn(4, 1, 1, 4, 4), analytic_batch(adapter, 4)
    loss = method.critic_loss(x0, batch)
    (call,) = adapter.of(method.critic)
    clean = call.x_t - column(call.t) * call.output
    per_sample = (clean - x0).square().mean((1, 2, 3, 4)) / flow_time_to_trigflow(call.t).sin().square()
    torch.testing.assert_close(loss.value, per_sample.mean())


@pytest.mark.parametrize(
    ("step", "options", "calls"),
    [
        (0, {"consistency_steps": 9}, ("ng", "n", "")),
        (0, {"consistency_steps": 9, "teacher_guidance": 3.0}, ("ng", "nn", "")),
        (0, {"consistency_steps": 9, "jvp": "central_difference"}, ("nng", "n", "")),
        (0, {"teacher_guidance": 3.0}, ("ngg", "nnnn", "n")),
        (15, {"teacher_guidance": 3.0}, ("ngnnng", "nnnn", "n")),
        (16, {}, ("nnnn", "", "g")),
    ],
)
def test_network_calls(step: int, options: dict[str, Any], calls: tuple[str, ...], adapter: SpyAdapter) -> None:
    method = rcm(adapter, generator_update_interval=5, **options)
    for loss in method.losses(analytic_batch(adapter, 2), step):
        loss.value.backward()
    assert tuple(adapter.grad_modes(h) for h in (method.student, method.teacher, method.critic)) == calls


@pytest.mark.parametrize("mean", [MEAN, -0.3])
def test_each_term_alone_rests_at_the_truth_and_only_there(mean: float, adapter: SpyAdapter) -> None:
    """The critic knows the student's distribution; gradients of many samples on the student's mean."""
    method = rcm(adapter, gaussian(adapter, "consistency", mean), gaussian(adapter, "denoiser", mean))
    batch = analytic_batch(adapter, 512)
    for loss in (method.consistency_loss(batch, 0), method.student_loss(method.rollout(batch, 2), batch)):
        (slope,) = torch.autograd.grad(loss.value, method.student.network.mean)
        assert bool(slope.abs() < 1e-5) if mean == MEAN else bool(slope < -1e-3), "descent raises a mean that is low"


@pytest.mark.nightly
def test_a_two_parameter_student_with_a_learned_critic_reaches_the_truth(adapter: SpyAdapter) -> None:
    networks = gaussian(adapter, "consistency", -0.5, 1.2), gaussian(adapter, "denoiser", -0.5, 1.2)
    method = rcm(adapter, *networks, generator_update_interval=2, consistency_weight=0.1, score_time_shift=1.0)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 1500, {"student": 1e-2, "critic": 2e-2})
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.02)


def test_the_exact_student_is_right_under_its_sampler_and_wrong_under_another(adapter: SpyAdapter) -> None:
    method, streams = rcm(adapter), RandomStreams(4)
    condition = adapter.conditioner.negative(5000)

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return method.student.velocity(x_t, t, condition)

    noise = streams.normal((5000, *adapter.codec.latent_shape))
    # The published times: angles arctan(80), 1.5, 1.4, 1.0.
    times = [
        1.0,
        *(float(torch.tensor(a).sin() / (torch.tensor(a).sin() + torch.tensor(a).cos())) for a in (1.5, 1.4, 1.0)),
    ]
    found = {kind: generate(kind, velocity, noise, times, streams.normal_like) for kind in ("renoise", "euler")}
    assert RCMMethod.sampler == "renoise"
    assert float(found["renoise"].var()) == pytest.approx(STD**2, rel=0.02)
    assert abs(float(found["euler"].var()) / STD**2 - 1) > 0.05


def test_its_roles_are_those_of_dmd2(adapter: SpyAdapter) -> None:
    assert isinstance(rcm(adapter).bundle, ModelBundle)
    assert (RCMMethod.trainable_roles, RCMMethod.frozen_roles) == (("student", "critic"), ("teacher",))
    assert RCMMethod.uses_latents(RCMConfig())
