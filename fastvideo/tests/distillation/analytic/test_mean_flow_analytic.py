"""MeanFlow against closed forms: targets in float64, fixed points, convergence, samplers, network calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.jvp import AutodiffDerivative
from fastvideo.distillation.methods.consistency_model.mean_flow import MeanFlowConfig, MeanFlowMethod
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.tangent import mean_velocity_target
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.exact import batch_of, bundle_of, column, draw, exact
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, SpyAdapter, analytic_batch, gaussian, moments, train

T = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)
R = torch.tensor([0.0, 0.3, 0.4, 0.0], dtype=torch.float64)
X0, NOISE = MEAN + STD * draw(4, 1, 1, 4, 4), draw(4, 1, 1, 4, 4, seed=6)
PLAIN = {"caption_dropout": 0.0, "equal_times": 0.0, "teacher_guidance": 1.0}


def mean_flow(
    adapter: SpyAdapter,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    *,
    seed: int = 3,
    **options: Any,
) -> MeanFlowMethod:
    """MeanFlow with the exact float64 mean velocity as student; without a teacher it trains on data."""
    trained = {"student": student or exact(adapter, "mean_velocity")}
    bundle = bundle_of(adapter, trained, {"teacher": teacher} if teacher else {})
    return MeanFlowMethod(MeanFlowConfig(**{**PLAIN, **options}), bundle, LADDER, RandomStreams(seed))


@pytest.mark.parametrize(("options", "rare"), [({}, True), ({"logit_std": 2.0}, False), ({"equal_times": 1.0}, True)])
def test_a_run_says_if_it_hardly_trains_the_first_jump_of_sampling(
    options: dict[str, float], rare: bool, adapter: SpyAdapter
) -> None:
    config = {"logit_mean": 0.0, "logit_std": 1.0, "equal_times": 0.25, **options}
    method = mean_flow(adapter, **config)
    t, r = method.times(200_000)
    share = float(((t > 0.95) & (r < t)).float().mean())
    assert (share < 0.01) == rare
    notes = [note for note in method.notes if "where sampling begins" in note]
    assert len(notes) == rare
    assert not notes or float(notes[0].split(" %")[0]) == pytest.approx(100 * share, abs=0.05)


def mean_velocity(x: Tensor, t: Tensor, r: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """``(x - x_r) / (t - r)`` along the flow of N(mean, std^2), written with both states."""
    t, r = column(t), column(r)
    v_t, v_r = (1 - t) ** 2 * std**2 + t**2, (1 - r) ** 2 * std**2 + r**2
    x_r = (1 - r) * mean + (v_r / v_t).sqrt() * (x - (1 - t) * mean)
    return (x - x_r) / (t - r)


def target_of(adapter: SpyAdapter, method: MeanFlowMethod, t: Tensor, r: Tensor, **batch: Any) -> tuple[Tensor, Tensor]:
    """Prediction and target, the latter read off the gradient of the unweighted loss."""
    assert (method.config.loss, method.config.loss_power) == ("adaptive", 0.0)
    adapter.calls.clear()
    method.student_loss(batch_of(X0, **batch), NOISE, t, r).value.backward()
    (call,) = [call for call in adapter.of(method.student) if call.with_grad]
    assert call.output.grad is not None
    return call.output.detach(), call.output.detach() - call.output.grad * call.output.numel() / 2


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_the_exact_mean_velocity_is_its_own_target_under_the_exact_velocity(adapter: SpyAdapter) -> None:
    method = mean_flow(adapter, teacher=exact(adapter, "denoiser"), loss_power=0.0)
    prediction, target = target_of(adapter, method, T, R)
    close(prediction, mean_velocity(add_noise(X0, NOISE, T), T, R))
    close(target, prediction)
    loss = mean_flow(adapter, teacher=exact(adapter, "denoiser")).student_loss(batch_of(X0), NOISE, T, R)
    assert float(loss.value.detach()) < 1e-16


def test_on_data_the_target_is_the_mean_velocity_on_average(adapter: SpyAdapter) -> None:
    """Of all data and noise that meet at one ``x_t``; the network is not the exact one, so its derivative counts."""
    count, t, r, x = 20_000, 0.8, 0.3, -0.2
    variance = (1 - t) ** 2 * STD**2 + t**2
    posterior = MEAN + (1 - t) * STD**2 / variance * (x - (1 - t) * MEAN)
    x0 = posterior + STD * t / variance**0.5 * draw(count, 1, 1, 1, 1)
    noise = (x - (1 - t) * x0) / t
    times, ends = (torch.full((count,), value, dtype=torch.float64) for value in (t, r))
    student = exact(adapter, "mean_velocity")
    x_t, velocity = torch.full_like(x0, x), noise - x0

    def field(a: Tensor, b: Tensor) -> Tensor:
        return adapter.velocity(student, a, b, batch_of(x0).condition, r=ends)

    slope = AutodiffDerivative()(field, x_t, times, velocity, torch.ones_like(times))
    target = mean_velocity_target(velocity, slope, times, ends)
    wanted = float(mean_velocity(x_t[:1], times[:1], ends[:1]))
    assert float(target.mean()) == pytest.approx(wanted, abs=4 * float(target.std()) / count**0.5)
    assert float(target.std()) > 0.1


@pytest.mark.parametrize("jvp", ["autodiff", "central_difference"])
def test_where_r_is_t_the_target_is_the_velocity_to_the_bit(jvp: str, adapter: SpyAdapter) -> None:
    method = mean_flow(adapter, exact(adapter, "mean_velocity", -0.3, 0.9), loss_power=0.0, jvp=jvp)
    t = torch.tensor([0.999, 0.8, 0.5, 0.002], dtype=torch.float64)
    _, target = target_of(adapter, method, t, t)
    close(target, NOISE - X0, 1e-12)
    velocity, derivative = draw(4, 1, 1, 2, 2), 1e6 * draw(4, 1, 1, 2, 2, seed=2)
    assert torch.equal(mean_velocity_target(velocity, derivative, t, t), velocity)


def test_a_point_of_data_has_one_mean_velocity_for_all_spans(adapter: SpyAdapter) -> None:
    point, noise = torch.full_like(X0, MEAN), NOISE
    x_t = add_noise(point, noise, T)
    student = exact(adapter, "mean_velocity", MEAN, 1e-9)
    for r in (R, 0.5 * T):
        close(adapter.velocity(student, x_t, T, batch_of(X0).condition, r=r), (x_t - MEAN) / column(T), 1e-7)


def test_two_jumps_are_one(adapter: SpyAdapter) -> None:
    student = RoleHandle("student", adapter, exact(adapter, "mean_velocity"))
    condition, x_t, middle = batch_of(X0).condition, add_noise(X0, NOISE, T), 0.4 * R + 0.6 * T
    twice = student.flow_map(student.flow_map(x_t, T, middle, condition), middle, R, condition)
    close(twice.detach(), student.flow_map(x_t, T, R, condition).detach())


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 0.8, 0.6, 0.3)])
def test_the_exact_student_is_right_under_its_sampler_and_wrong_under_another(
    times: tuple[float, ...], adapter: SpyAdapter
) -> None:
    method, streams = mean_flow(adapter, gaussian(adapter, "mean_velocity")), RandomStreams(4)
    condition, noise = adapter.conditioner.negative(4000), streams.normal((4000, *adapter.codec.latent_shape))

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return method.student.velocity(x_t, t, condition, r=r)

    x0 = generate(method.sampler, velocity, noise, times, streams.normal_like)
    torch.testing.assert_close(x0, MEAN + STD * noise, msg="the same noise ends in the same sample over any times")
    wrong = generate("euler", velocity, noise, times, streams.normal_like)
    assert abs(float(wrong.var()) / STD**2 - 1) > 0.1, "Euler reads the velocity at the start of a step alone"


@pytest.mark.parametrize(("w", "k"), [(1.0, 0.0), (0.2, 0.92), (2.0, 0.0), (0.5, -1.0)])
def test_the_mixture_of_equal_velocities_is_that_velocity(w: float, k: float, adapter: SpyAdapter) -> None:
    """A point of data: its conditional velocity is that of each pair."""
    method = mean_flow(adapter, exact(adapter, "mean_velocity", MEAN, 1e-9), mixture=(w, k))
    batch = batch_of(torch.full_like(X0, MEAN))
    assert batch.x0 is not None
    velocity, _ = method.flow(batch, add_noise(batch.x0, NOISE, T), NOISE, T)
    close(velocity, NOISE - MEAN, 1e-7)


def test_the_mixture_guides_by_its_weights_within_its_range_and_where_the_caption_is_kept(adapter: SpyAdapter) -> None:
    method = mean_flow(adapter, mixture=(0.4, 0.8), mixture_range=(0.4, 0.9), caption_dropout=0.5)
    batch, x_t = batch_of(X0, caption=0.5), add_noise(X0, NOISE, T)
    network, r = method.student.network, T
    of = [adapter.velocity(network, x_t, T, c, r=r).detach() for c in (batch.condition, batch.negative)]
    mixed, plain = 0.4 * (NOISE - X0) + 0.8 * of[0] - 0.2 * of[1], NOISE - X0
    seen: set[bool] = set()
    for _ in range(8):
        velocity, condition = method.flow(batch, x_t, NOISE, T)
        for i, t in enumerate(T.tolist()):
            kept = bool(condition.of("analytic")["shift"][i] == 0.5)
            seen.add(kept)
            close(velocity[i], mixed[i] if kept and 0.4 <= t <= 0.9 else plain[i])
    assert seen == {True, False}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_guided_teacher_is_the_velocity_of_target_and_direction(guidance: float, adapter: SpyAdapter) -> None:
    """Equal stds: guidance extrapolates the mean, and the exact mean velocity of that Gaussian fits."""
    student = exact(adapter, "mean_velocity", MEAN + (guidance - 1) * 0.5)
    method = mean_flow(adapter, student, exact(adapter, "denoiser"), teacher_guidance=guidance, loss_power=0.0)
    prediction, target = target_of(adapter, method, T, R, caption=0.5)
    close(target, prediction)


def test_central_differences_agree_to_their_step_squared(adapter: SpyAdapter) -> None:
    networks = exact(adapter, "mean_velocity", -0.3, 0.9), exact(adapter, "denoiser")
    times = torch.tensor([0.9, 0.8, 0.6, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.3, 0.4, 0.0])
    t, r = times[0], times[1].double()
    _, wanted = target_of(adapter, mean_flow(adapter, *networks, loss_power=0.0), t, r)
    errors = []
    for step in (2e-2, 1e-2):
        method = mean_flow(adapter, *networks, loss_power=0.0, jvp="central_difference", jvp_step=step)
        errors.append(float((target_of(adapter, method, t, r)[1] - wanted).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)
    assert errors[1] < 1e-2


def test_losses_weigh_samples_by_their_own_error(adapter: SpyAdapter) -> None:
    student = exact(adapter, "mean_velocity", -0.3, 0.9)
    plain = mean_flow(adapter, student, exact(adapter, "denoiser"), loss_power=0.0)
    prediction, target = target_of(adapter, plain, T, R)
    error = (target - prediction).square().mean((1, 2, 3, 4))
    found = {
        "plain": plain,
        "p = 0.75": mean_flow(adapter, student, exact(adapter, "denoiser"), loss_power=0.75, loss_constant=0.01),
        "unit": mean_flow(adapter, student, exact(adapter, "denoiser"), loss="unit_error", loss_constant=0.01),
    }
    values = {name: method.student_loss(batch_of(X0), NOISE, T, R).value for name, method in found.items()}
    close(values["plain"].detach(), error.mean())
    close(values["p = 0.75"].detach(), (error / (error + 0.01) ** 0.75).mean())
    close(values["unit"].detach(), (error / (error.sqrt() + 0.01) ** 2).mean())


def test_the_warm_up_fades_the_derivative_in(adapter: SpyAdapter) -> None:
    method = mean_flow(adapter, exact(adapter, "mean_velocity", -0.3, 0.9), loss_power=0.0)
    full, none, half = (method.student_loss(batch_of(X0), NOISE, T, R, w).value.detach() for w in (1.0, 0.0, 0.5))
    x_t = add_noise(X0, NOISE, T)
    u = adapter.velocity(method.student.network, x_t, T, batch_of(X0).condition, r=R).detach()
    close(none, (NOISE - X0 - u).square().mean())
    assert float(full) != pytest.approx(float(half), rel=1e-3)
    warming = mean_flow(adapter, gaussian(adapter, "mean_velocity"), tangent_warmup_steps=10)
    seen: list[float] = []
    warming.student_loss = lambda *arguments: seen.append(arguments[-1])  # type: ignore[method-assign, assignment, return-value]
    for step in (0, 5, 20):
        next(warming.losses(analytic_batch(adapter, 2), step))
    assert seen == [0.0, 0.5, 1.0]


def test_times_are_ordered_logit_normal_pairs_of_which_a_share_is_equal(adapter: SpyAdapter) -> None:
    method = mean_flow(adapter, equal_times=0.75, logit_mean=-0.4, logit_std=1.0)
    t, r = method.times(20_000)
    assert bool((r <= t).all())
    assert float((r == t).float().mean()) == pytest.approx(0.75, abs=0.01)
    # The later of two draws of N(m, s^2) has mean m + s / sqrt(pi), the earlier m - s / sqrt(pi).
    assert float(t.logit().mean()) == pytest.approx(-0.4 + 0.5642, abs=0.02)
    assert float(r[r < t].logit().mean()) == pytest.approx(-0.4 - 0.5642, abs=0.03)


@pytest.mark.parametrize(
    ("options", "teacher", "student_calls", "teacher_calls"),
    [
        ({}, False, "ng", ""),
        ({"mixture": (0.2, 0.92)}, False, "nnng", ""),
        ({"jvp": "central_difference"}, False, "nng", ""),
        ({}, True, "ng", "n"),
        ({"teacher_guidance": 3.0}, True, "ng", "nn"),
    ],
)
def test_network_calls(
    options: dict[str, Any], teacher: bool, student_calls: str, teacher_calls: str, adapter: SpyAdapter
) -> None:
    frozen = gaussian(adapter, "denoiser") if teacher else None
    method = mean_flow(adapter, gaussian(adapter, "mean_velocity"), frozen, **options)
    next(method.losses(analytic_batch(adapter, 2), 0)).value.backward()
    assert adapter.grad_modes(method.student) == student_calls
    if teacher:
        assert adapter.grad_modes(method.bundle["teacher"]) == teacher_calls


@pytest.mark.nightly
@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_two_parameter_student_reaches_the_truth(with_teacher: bool, adapter: SpyAdapter) -> None:
    teacher = gaussian(adapter, "denoiser") if with_teacher else None
    student = gaussian(adapter, "mean_velocity", -0.5, 1.2)
    method = mean_flow(adapter, student, teacher, equal_times=0.5, logit_mean=0.0)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 600, {"student": 2e-2})
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.02)


def test_a_mixture_without_a_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be below 1"):
        MeanFlowConfig(mixture=(0.2, 1.0))
