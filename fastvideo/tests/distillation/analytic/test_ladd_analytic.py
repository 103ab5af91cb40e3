"""LADD: whose turn it is, what counts as real, where gradient flows, and whole trainings against Gaussians."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastvideo.distillation.engine.training import attach_optimizer, training_of
from fastvideo.distillation.methods.distribution_matching import gan
from fastvideo.distillation.methods.distribution_matching.ladd import LADDConfig, LADDMethod
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, UserError
from fastvideo.tests.distillation.analytic.test_dmd2_gan_analytic import Quadratic, with_head
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


def method_of(adapter: SpyAdapter, mean: float = MEAN, std: float = STD, seed: int = 3, **options: Any) -> Any:
    return toy_method("ladd", adapter, mean=mean, std=std, rng=RandomStreams(seed), **options)


@pytest.mark.parametrize("interval", [2, 3])
def test_student_and_discriminator_take_turns(interval: int, adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter, generator_update_interval=interval), analytic_batch(adapter, 2)
    for step in range(7):
        turn = "student" if step % interval == 0 else "discriminator"
        assert method.active_roles(step) == (turn,)
        assert [loss.role for loss in method.losses(batch, step)] == [turn]


@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_forwards_and_where_gradient_flows(r1: float, adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter, -0.3, 0.9, rollout="data", r1_weight=r1), analytic_batch(adapter, 4)
    reached = []
    for step in (0, 1):
        adapter.calls.clear()
        adapter.feature_calls.clear()
        for loss in method.losses(batch, step):
            loss.value.backward()
        reached.append((adapter.grad_modes(method.student), adapter.grad_modes(method.teacher)))
        found = {h.name for h in method.bundle for p in h.network.parameters() if p.grad is not None}
        assert found == {"student", "discriminator"} if step else found == {"student"}
    assert reached == [("g", "g"), ("n", "nn" + ("n" if r1 else ""))]
    assert len(method.bundle["discriminator"].parameters()) == 8, "what was held is trained again"


def test_logits_are_a_row_per_sample_and_a_column_per_tap(adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter), analytic_batch(adapter, 5)
    logits = method.adversary.see(batch.x0, torch.full((5,), 0.5), batch.condition)
    assert logits.shape == (5, len(method.adversary.taps))
    assert logits.dtype == torch.float32


def test_the_students_gradient_is_the_chain_rule_through_the_teachers_features() -> None:
    adapter = spy((1, 1, 1, 2))
    head = Quadratic()
    head.weight.data = torch.tensor([0.1, 0.7, -0.3])
    method = with_head(method_of(adapter, renoise_range=(0.4, 0.4)), head)
    x0 = (MEAN + STD * normal((4, *adapter.codec.latent_shape), seeded(8))).requires_grad_()
    method.student_loss(x0, analytic_batch(adapter, 4)).value.backward()
    variance = 0.36 * STD**2 + 0.16
    y = (adapter.feature_calls[0].x_t.detach() - 0.6 * MEAN) / math.sqrt(variance)
    logits = (0.1 + 0.7 * y - 0.3 * y**2).mean((1, 2, 3, 4), keepdim=True)
    wanted = -torch.sigmoid(-logits) / 4 * (0.7 - 0.6 * y) / math.sqrt(variance) * 0.6 / 2
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, wanted, rtol=1e-4, atol=1e-7)


def test_one_student_step_against_a_fixed_discriminator_raises_its_logit() -> None:
    adapter = spy()
    head = Quadratic()
    head.weight.data = torch.tensor([0.0, 1.0, 0.0])
    method, batch = with_head(method_of(adapter), head), analytic_batch(adapter, 64)
    before = method.student.network.mean.item()
    next(method.losses(batch, 0)).value.backward()
    torch.optim.SGD(method.student.parameters(), lr=0.1).step()
    assert method.student.network.mean.item() > before, "a larger sample has the larger logit"


def test_noise_levels_are_logit_normal_and_clamped(adapter: SpyAdapter) -> None:
    t = method_of(adapter, renoise_mean=1.0, renoise_scale=0.5, renoise_range=(0.5, 0.9)).times(100_000)
    logit = torch.logit(t[(t > 0.5) & (t < 0.9)])
    assert t.dtype == torch.float32
    assert (float(t.min()), float(t.max())) == pytest.approx((0.5, 0.9))
    below = 0.5 * (1 + math.erf((0.0 - 1.0) / 0.5 / math.sqrt(2)))
    assert float((t == t.min()).float().mean()) == pytest.approx(below, abs=0.003)
    assert float((torch.logit(t) < 1.0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logit.mean()) < 1.3


def test_inputs_of_the_data_rollout_are_real_samples_at_every_rung() -> None:
    adapter = spy((1, 1, 16, 16))
    method, batch = method_of(adapter, rollout="data"), analytic_batch(adapter, 400)
    method.rollout(batch, 0)
    (call,) = adapter.of(method.student)
    assert torch.equal(call.t.unique(), torch.tensor(LADDER.times).flip(0))
    for t in LADDER.times:
        x = call.x_t[(call.t - t).abs() < 1e-6]
        assert float(x.mean()) == pytest.approx((1 - t) * MEAN, abs=0.02)
        assert float(x.var()) == pytest.approx((1 - t) ** 2 * STD**2 + t**2, rel=0.05)


def test_the_simulated_rollout_stops_at_a_rung_drawn_for_all(adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter), analytic_batch(adapter, 3)
    counts = []
    for _ in range(200):
        adapter.calls.clear()
        method.rollout(batch, 0)
        modes = adapter.grad_modes(method.student)
        assert modes == "n" * (len(modes) - 1) + "g"
        counts.append(len(modes))
    assert [counts.count(k) for k in (1, 2, 3, 4)] == pytest.approx([50] * 4, abs=25)


CURRICULUM = {"early_rung_shares": (0, 0, 1, 1), "early_rung_steps": 10, "rung_shares": (0.7, 0.1, 0.2, 0)}
STAGES = [(0, (0, 0, 0.5, 0.5)), (9, (0, 0, 0.5, 0.5)), (10, (0.7, 0.1, 0.2, 0)), (99, (0.7, 0.1, 0.2, 0))]


@pytest.mark.parametrize(("step", "shares"), STAGES)
def test_the_curriculum_begins_at_the_lower_rungs_for_samples_and_for_rollouts(
    step: int, shares: tuple[float, ...], adapter: SpyAdapter
) -> None:
    on_data = method_of(adapter, rollout="data", **CURRICULUM)
    on_data.rollout(analytic_batch(adapter, 10_000), step)
    (call,) = adapter.of(on_data.student)
    assert [float((call.t == t).float().mean()) for t in LADDER.times] == pytest.approx(shares, abs=0.02)
    first, second = (RandomStreams(3, rank=rank, ranks=2) for rank in range(2))
    stops = [on_data.rungs_at(step).stop(first) for _ in range(4000)]
    assert stops == [on_data.rungs_at(step).stop(second) for _ in range(4000)], "ranks run the same calls"
    assert [stops.count(k) / 4000 for k in range(4)] == pytest.approx(shares, abs=0.03)


def test_steps_of_training_follow_the_curriculum(adapter: SpyAdapter) -> None:
    early, later = (0, 0, 0, 1), (1, 0, 0, 0)
    options = {"early_rung_shares": early, "early_rung_steps": 3, "rung_shares": later}
    for rollout, calls in (("simulate", [4, 4, 4, 1, 1, 1]), ("data", [1] * 6)):
        method, batch = method_of(adapter, rollout=rollout, **options), analytic_batch(adapter, 4)
        for step, count in enumerate(calls):
            adapter.calls.clear()
            list(method.losses(batch, step))
            own = adapter.of(method.student)
            assert (len(own), float(own[-1].t[0])) == (count, pytest.approx(LADDER.times[-1 if step < 3 else 0]))


def test_only_the_students_rate_falls(adapter: SpyAdapter) -> None:
    options = LADDMethod.optimizers(LADDConfig(decay_steps=4, warmup_steps=2))
    assert {role: (one.warmup_steps, one.decay_steps) for role, one in options.items()} == {
        "student": (2, 4),
        "discriminator": (2, 0),
    }


def test_a_curriculum_that_does_not_fit_is_refused(adapter: SpyAdapter) -> None:
    with pytest.raises(UserError, match=r"rung_shares: 2 shares for a ladder of 4 steps \(1, 0.9, 0.75, 0.5\)"):
        method_of(adapter, rung_shares=(0.5, 0.5))
    with pytest.raises(UserError, match="early_rung_shares: 1 shares"):
        method_of(adapter, early_rung_shares=(1.0,), early_rung_steps=5)
    for options in ({"early_rung_steps": 5}, {"early_rung_shares": (0, 0, 1, 1)}):
        with pytest.raises(ValueError, match="set both, or neither"):
            LADDConfig.model_validate(options)
    with pytest.raises(ValueError, match="at least one ladder step"):
        LADDConfig(rung_shares=(0, 0, 0, 0))


def test_the_teachers_own_guided_samples_can_be_the_real_ones() -> None:
    adapter = spy((1, 1, 16, 16))
    options = {"real_samples": "teacher", "teacher_guidance": 2.0, "teacher_steps": 64, "teacher_shift": 1.0}
    method = method_of(adapter, **options)
    batch = analytic_batch(adapter, 200, captions=("0.5",) * 200, latents=False)
    real = method.real(batch)
    assert adapter.grad_modes(method.teacher) == "nn" * 64
    assert float(real.mean()) == pytest.approx(MEAN + 2.0 * 0.5, abs=0.02)
    assert float(real.std()) == pytest.approx(STD, abs=0.02)
    assert not LADDMethod.uses_latents(LADDConfig(real_samples="teacher"))
    assert list(method.losses(batch, 1))


def test_real_samples_of_the_data_are_asked_for(adapter: SpyAdapter) -> None:
    assert LADDMethod.uses_latents(LADDConfig())
    with pytest.raises(UserError, match="clean latents"):
        list(method_of(adapter).losses(analytic_batch(adapter, 4, latents=False), 1))


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_both_losses_reach_student_and_discriminator(kind: Any, adapter: SpyAdapter) -> None:
    method, batch = method_of(adapter, -0.3, 0.9, gan_loss=kind), analytic_batch(adapter, 8)
    head = Quadratic()
    head.weight.data = torch.tensor([0.1, 0.2, -0.3])
    with_head(method, head)
    (student,) = method.losses(batch, 0)
    logits = method.adversary.logits((adapter.feature_calls[0].output,), adapter.feature_calls[0].t, batch.condition)
    assert student.value.item() == pytest.approx(gan.generator_loss(logits, kind).item(), rel=1e-5)
    adapter.feature_calls.clear()
    (discriminator,) = method.losses(batch, 1)
    fake, real = (method.adversary.logits((c.output,), c.t, batch.condition) for c in adapter.feature_calls)
    assert discriminator.value.item() == pytest.approx(gan.discriminator_loss(fake, real, kind).item(), rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("start", [(-0.5, 1.2), (MEAN, STD)])
def test_a_two_parameter_student_reaches_the_truth_on_average(start: tuple[float, float]) -> None:
    """A head that is linear in the sufficient statistics tells any two Gaussians apart, so their match is exact."""
    adapter = spy((1, 1, 1, 16))
    head: nn.Module = Quadratic()
    method = method_of(adapter, *start, renoise_range=(0.4, 0.4), generator_update_interval=3)
    method = with_head(method, head)
    method.ladder = method.rungs.ladder = Ladder((1.0,))
    tail: list[tuple[float, float]] = []

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        adapter.feature_calls.clear()
        if step > 2000:
            tail.append(moments(method.student))
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 3000, {"student": 0.01, "discriminator": 0.05}, final_rate=0.1)
    mean, std = (sum(values) / len(tail) for values in zip(*tail, strict=True))
    assert (mean, std) == pytest.approx((MEAN, STD), abs=0.03)


def last_swing(decay: int) -> float:
    """Farthest that a two-parameter student is from the truth in the last 100 of 1500 steps, without an average."""
    rates = {"student_learning_rate": 0.03, "discriminator_learning_rate": 0.1, "betas": (0.0, 0.999)}
    options = {**rates, "weight_decay": 0.0, "renoise_range": (0.4, 0.4), "generator_update_interval": 3}
    adapter = spy((1, 1, 1, 16))
    method = with_head(method_of(adapter, -0.5, 1.2, decay_steps=decay, **options), Quadratic())
    method.ladder = method.rungs.ladder = Ladder((1.0,))
    for role, optimizer in LADDMethod.optimizers(method.config).items():
        attach_optimizer(method.bundle[role], optimizer)
    seen = []
    for step in range(1500):
        adapter.calls.clear()
        adapter.feature_calls.clear()
        for loss in method.losses(analytic_batch(adapter, 16, seed=step), step):
            loss.value.backward()
            training_of(method.bundle[loss.role]).step()
        seen.append(moments(method.student))
    return max(abs(mean - MEAN) + abs(std - STD) for mean, std in seen[-100:])


@pytest.mark.nightly
def test_a_falling_rate_ends_at_the_truth_around_which_a_constant_one_swings() -> None:
    assert last_swing(500) < 0.02 < last_swing(0)
