"""AnyFlow, both stages, against closed forms: targets, shares of the batch, balance, jumps, fixed points and calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.methods.distribution_matching.anyflow import (
    AnyFlowConfig,
    AnyFlowMethod,
    AnyFlowPretrainConfig,
    AnyFlowPretrainMethod,
)
from fastvideo.distillation.methods.distribution_matching.flow_map_loss import (
    FlowMapLoss,
    FlowMapLossConfig,
    balanced,
    beta_weight,
)
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.exact import batch_of, bundle_of, column, draw, exact
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, SpyAdapter, analytic_batch, gaussian, moments, train

T = torch.tensor([0.95, 0.8, 0.5, 0.3], dtype=torch.float64)
R = torch.tensor([0.0, 0.3, 0.4, 0.0], dtype=torch.float64)
X0, NOISE = MEAN + STD * draw(4, 1, 1, 4, 4), draw(4, 1, 1, 4, 4, seed=6)
KEEP = torch.ones(4, dtype=torch.bool)
PLAIN = {"fused_guidance": 1.0, "flow_time_shift": 1.0, "caption_dropout": 0.0, "balance": False}


def loss_of(adapter: SpyAdapter, student: nn.Module, **options: Any) -> FlowMapLoss:
    """The flow-map loss of a network."""
    handle = bundle_of(adapter, {"student": student}, {})["student"]
    return FlowMapLoss(FlowMapLossConfig(**{**PLAIN, **options}), handle, RandomStreams(3))


def anyflow(
    adapter: SpyAdapter,
    student: nn.Module | None = None,
    critic: nn.Module | None = None,
    seed: int = 3,
    **options: Any,
) -> AnyFlowMethod:
    """Stage two whose student and critic know the truth, unless others are given."""
    trained = {
        "student": student or gaussian(adapter, "mean_velocity"),
        "critic": critic or gaussian(adapter, "denoiser"),
    }
    bundle = bundle_of(adapter, trained, {"teacher": gaussian(adapter, "denoiser")})
    return AnyFlowMethod(
        AnyFlowConfig(**{"teacher_guidance": 1.0, **PLAIN, **options}), bundle, LADDER, RandomStreams(seed)
    )


def target_of(
    loss: FlowMapLoss, adapter: SpyAdapter, t: Tensor, r: Tensor, keep: Tensor = KEEP, caption: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The prediction, and the target read off the gradient: ``d loss_b / d u = 2 w (u - y) share / D``."""
    adapter.calls.clear()
    losses = loss.per_sample(batch_of(X0, caption), NOISE, t, r, keep)
    (losses / column(beta_weight(t)).flatten()).sum().backward()
    (call,) = [call for call in adapter.calls if call.with_grad]
    assert call.output.grad is not None
    return call.output.detach(), call.output.detach() - call.output.grad * 16 / 2


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def derivative(x: Tensor, v: Tensor, mean: float, std: float) -> Tensor:
    """``d/dt`` along ``(v, 1)`` of ``u = (x - x_r) / (t - r)``, with ``x_r = (1 - r) m + sqrt(v_r / v_t) y``."""
    t, r = column(T), column(R)
    v_t, v_r = (1 - t) ** 2 * std**2 + t**2, (1 - r) ** 2 * std**2 + r**2
    y, ratio = x - (1 - t) * mean, (v_r / v_t).sqrt()
    x_r = (1 - r) * mean + ratio * y
    dx_r = ratio * (v + mean) - ratio * (t - (1 - t) * std**2) / v_t * y
    return (v - dx_r - (x - x_r) / (t - r)) / (t - r)


def test_the_difference_is_the_derivative_to_the_step_squared(adapter: SpyAdapter) -> None:
    student, v = exact(adapter, "mean_velocity", -0.3, 0.9), NOISE - X0
    wanted = v - column(T - R) * derivative(add_noise(X0, NOISE, T), v, -0.3, 0.9)
    close(target_of(loss_of(adapter, student, jvp="autodiff"), adapter, T, R)[1], wanted)
    errors = []
    for step in (2e-2, 1e-2):
        _, found = target_of(loss_of(adapter, student, jvp_step=step), adapter, T, R)
        errors.append(float((found - wanted).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)
    assert float((target_of(loss_of(adapter, student), adapter, T, R)[1] - wanted).abs().max()) < 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_where_r_is_t_the_target_is_the_velocity(guidance: float, adapter: SpyAdapter) -> None:
    """Guided, the network's own prediction of what it would be without is regressed to it."""
    student = exact(adapter, "mean_velocity", -0.3, 0.9)
    loss = loss_of(adapter, student, fused_guidance=guidance)
    found = loss.per_sample(batch_of(X0, caption=0.5), NOISE, T, T, KEEP)
    x_t = add_noise(X0, NOISE, T)
    batch = batch_of(X0, caption=0.5)
    u, negative = (adapter.velocity(student, x_t, T, c) for c in (batch.condition, batch.negative))
    unguided = (u - (1 - guidance) * negative) / guidance
    error = (unguided - (NOISE - X0)).square().mean((1, 2, 3, 4))
    close(found.detach(), (beta_weight(T) * error).detach())


def test_a_dropped_caption_trains_the_negative_prediction_unguided(adapter: SpyAdapter) -> None:
    student = exact(adapter, "mean_velocity", -0.3, 0.9)
    guided, plain = loss_of(adapter, student, fused_guidance=3.0), loss_of(adapter, student)
    found = guided.per_sample(batch_of(X0, caption=0.5), NOISE, T, R, ~KEEP)
    close(found.detach(), plain.per_sample(batch_of(X0), NOISE, T, R, KEEP).detach())


def test_guidance_divides_the_derivative_too(adapter: SpyAdapter) -> None:
    student = exact(adapter, "mean_velocity", -0.3, 0.9)
    g = 3.0
    batch, x_t = batch_of(X0, caption=0.5), add_noise(X0, NOISE, T)
    found = loss_of(adapter, student, fused_guidance=g, jvp="autodiff").per_sample(batch, NOISE, T, R, KEEP)
    v = NOISE - X0

    def field(x: Tensor, t: Tensor) -> Tensor:
        return adapter.velocity(student, x, t, batch.condition, r=R)

    slope = torch.func.jvp(field, (x_t, T), (v, torch.ones_like(T)))[1]
    u, negative = (adapter.velocity(student, x_t, T, c, r=R) for c in (batch.condition, batch.negative))
    error = (u - (1 - g) * negative) / g - (v - column(T - R) * slope / g)
    close(found.detach(), (beta_weight(T) * error.square().mean((1, 2, 3, 4))).detach())


@pytest.mark.parametrize(("ranks", "count"), [(4, 2), (1, 8), (8, 1)])
def test_the_shares_are_those_of_the_global_batch(ranks: int, count: int, adapter: SpyAdapter) -> None:
    handle = bundle_of(adapter, {"student": gaussian(adapter, "mean_velocity")}, {})["student"]
    for seed in range(5):
        kinds: list[str] = []
        for rank in range(ranks):
            loss = FlowMapLoss(FlowMapLossConfig(), handle, RandomStreams(seed, rank=rank, ranks=ranks))
            for t, r in zip(*loss.times(count), strict=True):
                kinds.append("velocity" if r == t else "consistency" if r == 0 else "free")
        assert [kinds.count(kind) for kind in ("velocity", "consistency", "free")] == [4, 2, 2]


def test_a_batch_of_one_meets_every_share_in_turn(adapter: SpyAdapter) -> None:
    loss = loss_of(adapter, gaussian(adapter, "mean_velocity"), flow_time_shift=5.0)
    t, r = (torch.cat(parts) for parts in zip(*(loss.times(1) for _ in range(2000)), strict=True))
    assert float((r == t).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float((r == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    # The later of two uniform draws is above m with probability 1 - m^2; shift 5 takes 0.5 to 5 / 6.
    assert float((t > 5 / 6).float().mean()) == pytest.approx(0.75, abs=0.04)


def test_a_low_precision_time_is_refused(adapter: SpyAdapter) -> None:
    loss = loss_of(adapter, gaussian(adapter, "mean_velocity"))
    with pytest.raises(TypeError, match="time must be float32"):
        loss.per_sample(batch_of(X0), NOISE, T.bfloat16(), R.bfloat16(), KEEP)


def test_balance_brings_other_samples_to_the_level_of_the_velocity() -> None:
    losses = torch.tensor([2.0, 4.0, 0.5, 30.0], requires_grad=True)
    equal = torch.tensor([True, True, False, False])
    found = balanced(losses, equal)
    torch.testing.assert_close(found.detach(), torch.tensor([2.0, 4.0, 3.0, 3.0]), rtol=0, atol=1e-4)
    found.sum().backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1.0, 1.0, 3 / 0.5, 3 / 30.0]), rtol=1e-4, atol=1e-4)
    alone = balanced(losses.detach(), torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(alone, torch.full((4,), 36.5 / 4), rtol=1e-4, atol=1e-4)


def test_the_loss_is_balanced_unless_the_config_says_otherwise(adapter: SpyAdapter) -> None:
    student, batch = gaussian(adapter, "mean_velocity", -0.3), analytic_batch(adapter, 8)
    found = [float(loss_of(adapter, student, balance=balance)(batch).detach()) for balance in (True, False)]
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def test_the_weight_favours_noise_and_has_mean_one_over_uniform_times() -> None:
    assert beta_weight(torch.tensor([0.0, 0.19, 0.75, 1.0])).tolist() == pytest.approx([0.0, 0.64125, 1.40625, 0.0])
    assert float(beta_weight(torch.linspace(0, 1, 100_001, dtype=torch.float64)).mean()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_every_rollout_of_the_exact_flow_map_ends_in_the_same_clean_sample(seed: int, adapter: SpyAdapter) -> None:
    """Whatever was drawn: not the state after the middle jump, which still has noise in it."""
    method = anyflow(adapter, seed=seed)
    x0 = method.rollout(analytic_batch(adapter, 4)).detach()
    noise = RandomStreams(seed).normal(x0.shape)
    torch.testing.assert_close(x0, MEAN + STD * noise, rtol=0, atol=1e-5)


def test_jumps_of_the_rollout_all_carry_gradient_and_are_three_at_most(adapter: SpyAdapter) -> None:
    method = anyflow(adapter, rollout_steps=(1, 2, 4), score_time_shift=5.0)
    seen = set()
    for _ in range(40):
        adapter.calls.clear()
        method.rollout(analytic_batch(adapter, 2))
        calls = adapter.of(method.student)
        assert all(call.with_grad for call in calls)
        path = [float(calls[0].t[0]), *(float(call.r[0]) for call in calls if call.r is not None)]
        assert path == sorted(path, reverse=True)
        seen.add(tuple(round(time, 4) for time in path))
    # Grids of 1, 2 and 4 steps under shift 5: 1; 1, .8333; 1, .9375, .8333, .625.
    assert seen == {
        (1.0, 0.0),
        (1.0, 0.8333, 0.0),
        (1.0, 0.9375, 0.0),
        (1.0, 0.9375, 0.8333, 0.0),
        (1.0, 0.8333, 0.625, 0.0),
        (1.0, 0.625, 0.0),
    }


@pytest.mark.parametrize("mean", [MEAN, -0.3])
def test_each_term_of_the_second_stage_rests_at_the_truth_and_only_there(mean: float, adapter: SpyAdapter) -> None:
    method = anyflow(adapter, gaussian(adapter, "mean_velocity", mean), gaussian(adapter, "denoiser", mean))
    batch = analytic_batch(adapter, 2000)
    for loss in (method.flow_map_loss(batch), method.student_loss(method.rollout(batch), batch).value):
        (slope,) = torch.autograd.grad(loss, method.student.network.mean)
        assert bool(slope.abs() < 0.03) if mean == MEAN else bool(slope < -0.1), "descent raises a mean that is low"


def test_losses_of_the_second_stage_come_in_order_with_their_weight(adapter: SpyAdapter) -> None:
    method = anyflow(adapter, flow_map_weight=0.25, generator_update_interval=2)
    batch = analytic_batch(adapter, 4)
    first, second, third = method.losses(batch, 0)
    assert [loss.role for loss in (first, second, third)] == ["student", "student", "critic"]
    torch.testing.assert_close(first.value.detach(), 0.25 * first.metrics["flow_map_loss"])
    assert [loss.role for loss in method.losses(batch, 1)] == ["critic"]
    alone = anyflow(adapter, flow_map_weight=0.0)
    assert [loss.role for loss in alone.losses(analytic_batch(adapter, 4, latents=False), 0)] == ["student", "critic"]
    assert AnyFlowMethod.uses_latents(method.config)
    assert not AnyFlowMethod.uses_latents(alone.config)


def test_the_critic_learns_at_shifted_logit_normal_times(adapter: SpyAdapter) -> None:
    method = anyflow(adapter, score_time_shift=5.0)
    method.critic_loss(torch.zeros(20_000, 1, 1, 4, 4), analytic_batch(adapter, 20_000))
    (call,) = adapter.of(method.critic)
    assert float((call.t < 5 / 6).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((call.t >= 0.98).float().mean()) == pytest.approx(0.0112, abs=0.005)
    assert float(call.t.max()) == pytest.approx(0.98)


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, "nng"), ({"fused_guidance": 3.0}, "nngn"), ({"jvp": "autodiff"}, "ng")],
)
def test_network_calls_of_the_first_stage(options: dict[str, Any], calls: str, adapter: SpyAdapter) -> None:
    loss = loss_of(adapter, gaussian(adapter, "mean_velocity"), **options)
    loss(analytic_batch(adapter, 4)).backward()
    assert adapter.grad_modes(loss.student) == calls


def test_network_calls_of_the_second_stage(adapter: SpyAdapter) -> None:
    method = anyflow(adapter, rollout_steps=(1,), teacher_guidance=3.0)
    for loss in method.losses(analytic_batch(adapter, 4), 0):
        loss.value.backward()
    found = tuple(adapter.grad_modes(h) for h in (method.student, method.teacher, method.critic))
    assert found == ("nng" + "g", "nn", "n" + "g")


@pytest.mark.nightly
def test_a_two_parameter_student_reaches_the_truth_from_data(adapter: SpyAdapter) -> None:
    bundle = bundle_of(adapter, {"student": gaussian(adapter, "mean_velocity", -0.5, 1.2)}, {})
    method = AnyFlowPretrainMethod(AnyFlowPretrainConfig(**PLAIN), bundle, LADDER, RandomStreams(3))

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 600, {"student": 2e-2})
    assert moments(method.bundle["student"]) == pytest.approx((MEAN, STD), abs=0.03)


def test_the_exact_student_is_right_under_its_sampler_and_wrong_under_another(adapter: SpyAdapter) -> None:
    method, streams = anyflow(adapter), RandomStreams(4)
    condition, noise = adapter.conditioner.negative(4000), streams.normal((4000, *adapter.codec.latent_shape))

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return method.student.velocity(x_t, t, condition, r=r)

    kinds: tuple[SamplerKind, ...] = ("flow_map", "euler", "renoise")
    found = {kind: generate(kind, velocity, noise, (1.0, 0.5), streams.normal_like) for kind in kinds}
    assert AnyFlowMethod.sampler == AnyFlowPretrainMethod.sampler == "flow_map"
    torch.testing.assert_close(found["flow_map"], MEAN + STD * noise)
    for kind in ("euler", "renoise"):
        assert abs(float(found[kind].var()) / STD**2 - 1) > 0.1
