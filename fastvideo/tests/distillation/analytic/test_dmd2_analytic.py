"""DMD2's gradient and sampler against closed forms (Gaussian teacher, Gaussian student, exact or learned critic)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation import interpolant, noise
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method, dmd_gradient
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
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

T = 0.6
FACTOR = T**2 / ((1 - T) ** 2 * STD**2 + T**2)
"""sigma^2 / v_t at T: 0.36 / 0.3856."""


def dmd2(
    adapter: SpyAdapter,
    mean: float = MEAN,
    std: float = STD,
    *,
    ladder: Ladder = LADDER,
    critic: tuple[float, float] | None = None,
    seed: int = 3,
    **options: Any,
) -> DMD2Method:
    """DMD2 whose student makes N(mean, std^2) and whose critic knows it (or ``critic``)."""
    networks = {
        "student": gaussian(adapter, "consistency", mean, std),
        "teacher": gaussian(adapter, "denoiser"),
        "critic": gaussian(adapter, "denoiser", *(critic or (mean, std))),
    }
    handles = [RoleHandle(n, adapter, network, trainable=n != "teacher") for n, network in networks.items()]
    config = DMD2Config(**{"teacher_guidance": 1.0, **options})
    return DMD2Method(config, ModelBundle(handles), ladder, RandomStreams(seed))


def x0_of(adapter: SpyAdapter, count: int, mean: float = MEAN, std: float = STD) -> Tensor:
    """Samples of N(mean, std^2) as a leaf that collects gradient."""
    drawn = torch.randn((count, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(8))
    return (mean + std * drawn).requires_grad_()


def gaussian_x0(call_x: Tensor, t: float, mean: float) -> Tensor:
    """Posterior mean of N(mean, STD^2) at ``x_t``."""
    return mean + (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2) * (call_x - (1 - t) * mean)


@pytest.mark.parametrize(("guidance", "caption"), [(1.0, 0.0), (4.5, 0.0), (1.0, 0.5), (3.0, 0.5)])
def test_the_gradient_before_normalising_is_the_difference_of_means_scaled(
    guidance: float, caption: float, adapter: SpyAdapter
) -> None:
    student_mean = -0.3
    method = dmd2(adapter, student_mean, score_time_range=(T, T), teacher_guidance=guidance)
    x0 = x0_of(adapter, 6, student_mean)
    method.student_loss(x0, analytic_batch(adapter, 6, captions=(str(caption),) * 6)).value.backward()
    x_t = adapter.of(method.critic)[0].x_t
    target_mean = MEAN + guidance * caption
    scale = (x0.detach() - gaussian_x0(x_t, T, target_mean)).abs().mean((1, 2, 3, 4), keepdim=True)
    assert x0.grad is not None
    found = x0.grad * x0.numel() * (scale + 1e-6)
    expected = (student_mean + caption - target_mean) * FACTOR
    assert pytest.approx(0.9336, abs=5e-5) == FACTOR
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=1e-4)


def test_a_student_at_the_truth_has_a_gradient_of_exactly_zero(adapter: SpyAdapter) -> None:
    method, x0 = dmd2(adapter), x0_of(adapter, 4)
    loss = method.student_loss(x0, analytic_batch(adapter, 4))
    loss.value.backward()
    assert float(loss.value.detach()) == 0.0
    assert x0.grad is not None
    assert torch.count_nonzero(x0.grad) == 0


def test_the_difference_of_denoisers_is_a_scaled_difference_of_scores(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, -0.3, 0.9)
    for handle in method.bundle:
        handle.network.double()
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    x_t = torch.randn((9, 1, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    condition = adapter.conditioner.negative(9)
    critic, teacher = method.critic, method.teacher
    denoisers = critic.x0(x_t, t, condition) - teacher.x0(x_t, t, condition)
    scores = [interpolant.velocity_to_score(x_t, h.velocity(x_t, t, condition), t) for h in (critic, teacher)]
    scale = (t**2 / (1 - t)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(denoisers, scale * (scores[0] - scores[1]), rtol=1e-8, atol=1e-8)


def test_the_normaliser_at_the_optimum_is_the_mean_absolute_posterior_deviation() -> None:
    adapter = spy((1, 1, 450, 450))
    method, x0 = dmd2(adapter, score_time_range=(T, T)), x0_of(adapter, 1)
    method.student_loss(x0, analytic_batch(adapter, 1))
    real = gaussian_x0(adapter.of(method.critic)[0].x_t, T, MEAN)
    normalised = dmd_gradient(x0.detach(), real=real, fake=real + 1.0)
    expected = math.sqrt(2 / math.pi) * STD * T / math.sqrt((1 - T) ** 2 * STD**2 + T**2)
    assert expected == pytest.approx(0.3084, abs=1e-4)
    torch.testing.assert_close(normalised, torch.full_like(normalised, 1 / expected), rtol=0.01, atol=0)


def test_the_gradient_points_from_the_teacher_to_the_critic_and_is_float32() -> None:
    x0, real = torch.zeros(1, 1, 1, 1, 2), torch.tensor([1.0, -3.0]).view(1, 1, 1, 1, 2)
    found = dmd_gradient(x0.bfloat16(), real=real.bfloat16(), fake=torch.zeros_like(real).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.tensor([-0.5, 1.5]), rtol=1e-5, atol=1e-5)


def test_samples_are_normalised_alone() -> None:
    adapter = spy()
    gradients = []
    for scale in (1.0, 100.0):
        method, x0 = dmd2(adapter, -0.3), x0_of(adapter, 2).detach()
        x0[1] *= scale
        x0.requires_grad_()
        method.student_loss(x0, analytic_batch(adapter, 2)).value.backward()
        gradients.append(x0.grad)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_each_backward_reaches_the_named_role_alone(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, -0.3, 0.9)
    reached = []
    for loss in method.losses(analytic_batch(adapter, 4), 0):
        for handle in method.bundle:
            handle.network.zero_grad()
        loss.value.backward()
        reached.append(
            (loss.role, {h.name for h in method.bundle for p in h.network.parameters() if p.grad is not None})
        )
    assert reached == [("student", {"student"}), ("critic", {"critic"})]


@pytest.mark.parametrize("interval", [1, 5])
def test_the_critic_trains_on_every_step_and_the_student_on_every_interval(interval: int, adapter: SpyAdapter) -> None:
    method = dmd2(adapter, generator_update_interval=interval)
    for step in range(11):
        due = ("student", "critic") if step % interval == 0 else ("critic",)
        assert method.active_roles(step) == due
        assert tuple(loss.role for loss in method.losses(analytic_batch(adapter, 2), step)) == due


def test_the_critic_of_a_student_step_sees_the_students_own_sample(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, -0.3, 0.9, ladder=Ladder((1.0,)))
    list(method.losses(analytic_batch(adapter, 3), 0))
    student, (on_score, on_loss) = adapter.of(method.student)[0], adapter.of(method.critic)
    x0 = noise.velocity_to_x0(student.x_t, student.output, student.t).detach()
    first, second = (
        (c.x_t - (1 - c.t.view(-1, 1, 1, 1, 1)) * x0) / c.t.view(-1, 1, 1, 1, 1) for c in (on_score, on_loss)
    )
    assert not on_loss.x_t.requires_grad
    assert not torch.equal(on_score.t, on_loss.t), "the critic draws its own time"
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.5, "and its own noise"
    assert abs(float(second.mean())) < 0.6
    assert 0.6 < float(second.std()) < 1.4, "what is left after taking the sample out is unit noise"


def test_the_critic_regresses_the_velocity_of_the_students_distribution() -> None:
    adapter = spy((1, 1, 32, 32))
    method = dmd2(adapter, -0.5, 1.2, score_time_range=(T, T))
    x0 = x0_of(adapter, 400, -0.5, 1.2).detach()
    loss = method.critic_loss(x0, analytic_batch(adapter, 400))
    assert float(loss.value.detach()) == pytest.approx(1.2**2 / ((1 - T) ** 2 * 1.2**2 + T**2), rel=0.01)


def test_score_times_are_uniform_then_shifted_then_clamped(adapter: SpyAdapter) -> None:
    t = dmd2(adapter, score_time_shift=5.0).score_times(100_000)
    assert t.dtype == torch.float32
    assert (float(t.min()), float(t.max())) == pytest.approx((0.02, 0.98))
    assert float((t < 0.5).float().mean()) == pytest.approx(0.5 / (5 - 4 * 0.5), abs=0.005)
    assert float((t == t.min()).float().mean()) == pytest.approx(0.02 / (5 - 4 * 0.02), abs=0.001)


def test_a_two_parameter_student_with_a_learned_critic_reaches_the_truth() -> None:
    adapter = spy((1, 1, 1, 16))
    method = dmd2(adapter, -0.5, 1.2, ladder=Ladder((1.0,)), generator_update_interval=2)
    batch = analytic_batch(adapter, 64, latents=False)

    def batches(step: int) -> Any:
        adapter.calls.clear()
        return batch

    train(method, batches, 600, {"student": 0.03, "critic": 0.06}, final_rate=0.05)
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.02)
