"""The adversarial term against closed forms: losses, gradients, the best discriminator, R1, and whole trainings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.builder import initialising
from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.methods.distribution_matching import gan
from fastvideo.distillation.methods.distribution_matching.discriminator import Discriminator, taps_at
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.methods.distribution_matching.dmd2_gan import DMD2GANConfig, DMD2GANMethod
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Given, UserError
from fastvideo.tests.distillation.toys import (
    LADDER,
    MEAN,
    STD,
    SpyAdapter,
    analytic_batch,
    moments,
    spy,
    toy_method,
    train,
)

T = 0.4
VARIANCE = (1 - T) ** 2 * STD**2 + T**2


class Quadratic(nn.Module):
    """A head that is linear in the sufficient statistics: the family of the best discriminators of two Gaussians."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, features: tuple[Tensor, ...], t: Tensor, given: Given | None = None) -> Tensor:
        return torch.stack([tokens @ self.weight.to(tokens.dtype) for tokens in features], 1).mean(2)


def method_of(adapter: SpyAdapter, mean: float = MEAN, std: float = STD, *, seed: int = 3, **options: Any) -> Any:
    return toy_method("dmd2_gan", adapter, mean=mean, std=std, rng=RandomStreams(seed), **options)


def with_head(method: Any, head: nn.Module) -> Any:
    """The method with another network in the role of the discriminator."""
    method.bundle["discriminator"].network = head
    return method


def x0_of(adapter: SpyAdapter, count: int, mean: float = MEAN, std: float = STD) -> Tensor:
    return (mean + std * normal((count, *adapter.codec.latent_shape), seeded(8))).requires_grad_()


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator", "slope"),
    [("softplus", 2 * math.log(2), math.log(2), -0.5), ("hinge", 2.0, 0.0, -1.0)],
)
def test_losses_and_slopes_at_zero_logits(kind: Any, discriminator: float, generator: float, slope: float) -> None:
    fake = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    real = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    assert gan.discriminator_loss(fake, real, kind).item() == pytest.approx(discriminator)
    loss = gan.generator_loss(fake, kind)
    assert loss.item() == pytest.approx(generator)
    (gradient,) = torch.autograd.grad(loss, fake)
    torch.testing.assert_close(gradient, torch.full_like(gradient, slope / fake.numel()))
    on_fake, on_real = torch.autograd.grad(gan.discriminator_loss(fake, real, kind), (fake, real))
    torch.testing.assert_close(on_fake, -gradient)
    torch.testing.assert_close(on_real, gradient)


def test_losses_at_a_point_in_float64() -> None:
    fake, real = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[2.0, -0.5]], dtype=torch.float64)
    softplus = [math.log1p(math.exp(v)) for v in (0.3, -1.2, -2.0, 0.5, -0.3, 1.2)]
    assert float(gan.discriminator_loss(fake, real)) == pytest.approx(sum(softplus[:4]) / 2)
    assert float(gan.generator_loss(fake)) == pytest.approx(
        (math.log1p(math.exp(-0.3)) + math.log1p(math.exp(1.2))) / 2
    )
    assert float(gan.discriminator_loss(fake, real, "hinge")) == pytest.approx((1.3 + 0 + 0 + 1.5) / 2)
    assert float(gan.generator_loss(fake, "hinge")) == pytest.approx(0.45)


def test_the_students_gradient_is_the_chain_rule_through_the_teachers_features() -> None:
    """With a linear head on ``1, y, y^2``: ``dL / dx0 = -weight sigmoid(-l) / B (w1 + 2 w2 y) / sqrt(v) (1 - t)``."""
    adapter = spy((1, 1, 1, 2))
    head = Quadratic()
    head.weight.data = torch.tensor([0.1, 0.7, -0.3])
    options = {"score_time_range": (T, T), "gan_weight": 0.5}
    x0 = x0_of(adapter, 4)
    with_head(method_of(adapter, **options), head).student_loss(x0, analytic_batch(adapter, 4)).value.backward()
    y = (adapter.calls[0].x_t.detach() - (1 - T) * MEAN) / math.sqrt(VARIANCE)
    logits = (0.1 + 0.7 * y - 0.3 * y**2).mean((1, 2, 3, 4), keepdim=True)
    slope = (0.7 - 0.6 * y) / math.sqrt(VARIANCE) * (1 - T) / 2
    assert x0.grad is not None  # at the truth the DMD gradient is exactly zero, so all of it is the adversarial term's
    torch.testing.assert_close(x0.grad, -0.5 * torch.sigmoid(-logits) / 4 * slope, rtol=1e-4, atol=1e-7)


def test_one_student_step_against_a_fixed_discriminator_raises_its_logit() -> None:
    adapter = spy()
    head = Quadratic()
    head.weight.data = torch.tensor([0.0, 1.0, 0.0])
    method = with_head(method_of(adapter, gan_weight=1.0), head)
    batch, generator = analytic_batch(adapter, 64), method.bundle["student"]

    def logit() -> float:
        with torch.no_grad():
            x0 = generator.x0(normal(batch.shape, seeded(2)), torch.ones(64), batch.condition)
            return float(method.adversary.see(x0, torch.full((64,), 0.5), batch.condition).mean())

    before = logit()
    method.student_loss(method.rollout(batch), batch).value.backward()
    torch.optim.SGD(generator.parameters(), lr=0.1).step()
    assert logit() > before


def test_a_student_step_reaches_the_student_through_frozen_weights_alone(adapter: SpyAdapter) -> None:
    for features_of in ("teacher", "critic"):
        method = method_of(adapter, -0.3, 0.9, features_of=features_of, gan_weight=1.0)
        losses = method.losses(analytic_batch(adapter, 4), 0)
        next(losses).value.backward()
        for name in ("teacher", "critic", "discriminator"):
            assert all(p.grad is None for p in method.bundle[name].network.parameters()), name
        assert all(p.grad is not None for p in method.bundle["student"].parameters())
        rest = [loss.role for loss in losses]
        assert rest == ["critic", "discriminator"]
        assert len(method.bundle["discriminator"].parameters()) == 8, "what was held is trained again"


@pytest.mark.parametrize(("guidance", "r1"), [(1.0, 0.0), (3.0, 0.5)])
def test_forwards_are_those_of_dmd2_and_the_discriminators(guidance: float, r1: float, adapter: SpyAdapter) -> None:
    method = method_of(adapter, teacher_guidance=guidance, r1_weight=r1)
    for loss in method.losses(analytic_batch(adapter, 4), 0):
        loss.value.backward()
    guided = "n" if guidance != 1.0 else ""
    assert adapter.grad_modes(method.teacher) == "g" + guided + "nn" + ("n" if r1 else "")
    assert adapter.grad_modes(method.critic) == "ng"
    assert adapter.grad_modes(method.student).count("g") == 1
    adapter.calls.clear()
    adapter.feature_calls.clear()
    list(method.losses(analytic_batch(adapter, 4), 1))
    assert adapter.grad_modes(method.teacher) == "nn" + ("n" if r1 else "")
    assert set(adapter.grad_modes(method.student)) == {"n"}


def test_without_weight_the_student_learns_as_in_dmd2(adapter: SpyAdapter) -> None:
    method, gradients = method_of(adapter, -0.3, 0.9, gan_weight=0.0, teacher_guidance=2.0), []
    handles = [method.bundle[name] for name in ("student", "teacher", "critic")]
    plain = DMD2Method(method.config, ModelBundle(handles), LADDER, RandomStreams(3))
    batch = analytic_batch(adapter, 4, captions=("0", "1", "0.5", "-1"))
    for one in (method, plain):
        one.rng = RandomStreams(3)
        x0 = x0_of(adapter, 4, -0.3, 0.9)
        one.student_loss(x0, batch).value.backward()
        gradients.append(x0.grad)
    assert torch.equal(*gradients)


def test_real_and_fake_meet_the_discriminator_at_the_same_noise(adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter), analytic_batch(adapter, 4)
    x0 = x0_of(adapter, 4, -1.0).detach()
    method.discriminator_loss(x0, batch)
    fake, real = adapter.feature_calls
    assert torch.equal(fake.t, real.t)
    assert batch.x0 is not None
    scale = (1 - fake.t).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(fake.x_t - real.x_t, scale * (x0 - batch.x0), rtol=1e-4, atol=1e-6)


def test_pairs_that_the_discriminator_tells_apart_are_counted() -> None:
    """At one noise a fake above its real sample is taken for real by a rising head, and told apart by a falling one."""
    adapter, head = spy((1, 1, 1, 1)), Quadratic()
    method, batch = with_head(method_of(adapter), head), analytic_batch(adapter, 8)
    above = torch.tensor([-1.0, 1.0, 1.0, 1.0] * 2).view(8, 1, 1, 1, 1)
    for slope, share in ((1.0, 0.25), (-1.0, 0.75)):
        head.weight.data = torch.tensor([0.0, slope, 0.0])
        metrics = method.discriminator_loss(batch.latents + above, batch).metrics
        assert float(metrics["told_apart"]) == share


def test_the_best_discriminator_of_two_gaussians_is_found_by_its_own_loss() -> None:
    """``l = alpha (mu - m) / v (x - alpha (mu + m) / 2)``; linear in the teacher's ``y``."""
    adapter, student_mean = spy((1, 1, 1, 1)), 0.2
    head = Quadratic()
    method = with_head(method_of(adapter, score_time_range=(T, T)), head)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for step in range(300):
        adapter.feature_calls.clear()
        batch = analytic_batch(adapter, 2000, seed=step)
        fake = student_mean + STD * normal(batch.shape, seeded(10_000 + step))
        optimizer.zero_grad()
        method.discriminator_loss(fake, batch).value.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
    wanted = (1 - T) * (MEAN - student_mean) / math.sqrt(VARIANCE)
    offset = (1 - T) ** 2 * (MEAN - student_mean) ** 2 / (2 * VARIANCE)
    assert head.weight.tolist() == pytest.approx([offset, wanted, 0.0], abs=0.05 * wanted)


def test_r1_of_a_linear_discriminator_is_its_squared_slope() -> None:
    slope = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
    x, noise = (normal((200_000, 3), seeded(i), dtype=torch.float64) for i in (1, 2))
    for sigma in (0.1, 0.01):
        penalty = gan.approximate_r1(x @ slope, (x + sigma * noise) @ slope, sigma)
        assert float(penalty) == pytest.approx(1.78, rel=0.01), (
            "divided by sigma: its square times that is APT's 0.0178"
        )
    flat = torch.zeros(5, 2)
    assert float(gan.approximate_r1(flat, flat, 0.1)) == 0.0


@pytest.mark.parametrize("sigma", [0.1, 1e-3])
def test_the_penalty_moves_the_tensor_that_the_discriminator_saw(sigma: float, adapter: SpyAdapter) -> None:
    """Moving the clean latent instead would compare logits at two noise levels, and not vanish with sigma."""
    method = method_of(adapter, r1_weight=1.0, r1_sigma=sigma)
    method.discriminator_loss(x0_of(adapter, 4).detach(), analytic_batch(adapter, 4)).value.backward()
    _, real, moved = adapter.feature_calls
    assert torch.equal(real.t, moved.t)
    assert float((moved.x_t - real.x_t).std()) == pytest.approx(sigma, rel=0.2)


def test_the_penalty_tends_to_r1_and_reaches_the_discriminator_alone() -> None:
    adapter = spy((1, 1, 1, 1))
    head = Quadratic()
    head.weight.data = torch.tensor([0.0, 0.8, 0.0])
    for handle in (method := with_head(method_of(adapter, r1_weight=0.5, score_time_range=(T, T)), head)).bundle:
        handle.network.requires_grad_(handle.trainable)
    loss = method.discriminator_loss(x0_of(adapter, 50_000).detach(), analytic_batch(adapter, 50_000))
    assert float(loss.metrics["r1"]) == pytest.approx(0.8**2 / VARIANCE, rel=0.03)
    loss.value.backward()
    assert {h.name for h in method.bundle for p in h.network.parameters() if p.grad is not None} <= {"discriminator"}
    assert head.weight.grad is not None
    plain = method_of(adapter, score_time_range=(T, T))
    with_head(plain, head)
    same = plain.discriminator_loss(x0_of(adapter, 50_000).detach(), analytic_batch(adapter, 50_000)).value
    assert float((loss.value - same).detach()) == pytest.approx(0.5 * float(loss.metrics["r1"]), rel=1e-3)


def test_heads_read_the_time_and_every_tap_and_leave_given_frames_out() -> None:
    with initialising(0):
        heads = Discriminator((3, 5), 8)
    features = (normal((4, 6, 3), seeded(1)), normal((4, 6, 5), seeded(2)))
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    logits = heads(features, t)
    assert logits.shape == (4, 2)
    assert (heads(features, t.flip(0)) - logits).abs().min() > 0
    assert torch.equal(heads((features[0], 2 * features[1]), t)[:, 0], logits[:, 0])
    torch.testing.assert_close(heads((features[0], 7 * features[1]), t), logits)  # RMS-normed
    mask = torch.tensor([[True, False, False]] * 4)
    given = Given(mask, torch.zeros(4, 1, 3, 1, 1))
    torch.testing.assert_close(heads(features, t, given), heads(tuple(f[:, 2:] for f in features), t))


def test_depths_are_blocks_whatever_their_number() -> None:
    assert taps_at((0.5, 0.75, 1.0), 30) == (14, 22, 29)
    assert taps_at((0.5, 0.75, 1.0), 4) == (1, 2, 3)
    assert taps_at((0.5, 0.75, 1.0), 1) == (0,)
    assert taps_at((0.01,), 30) == (0,)
    with pytest.raises(UserError, match="dmd2"):
        taps_at((1.0,), 0)


def test_real_samples_are_asked_for(adapter: SpyAdapter) -> None:
    assert DMD2GANMethod.uses_latents(DMD2GANConfig())
    with pytest.raises(UserError, match="clean latents"):
        list(method_of(adapter).losses(analytic_batch(adapter, 4, latents=False), 1))


@pytest.mark.nightly
def test_a_two_parameter_student_reaches_the_truth_on_average() -> None:
    adapter = spy((1, 1, 1, 16))
    method = method_of(adapter, -0.5, 1.2, gan_weight=0.1, generator_update_interval=2)
    method.ladder = Ladder((1.0,))
    tail: list[tuple[float, float]] = []

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        adapter.feature_calls.clear()
        if step > 1500:
            tail.append(moments(method.student))
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 2000, {"student": 0.01, "critic": 0.02, "discriminator": 0.01}, final_rate=0.1)
    mean, std = (sum(values) / len(tail) for values in zip(*tail, strict=True))
    assert (mean, std) == pytest.approx((MEAN, STD), abs=0.03)
