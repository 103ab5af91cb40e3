"""DMD2's rollouts: which forwards run, with what gradient, on which inputs."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.analytic.test_dmd2_analytic import dmd2
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, SpyAdapter, analytic_batch, spy

STOPS = range(len(LADDER))


class StopAt(RandomStreams):
    """Streams whose shared decision is fixed."""

    def __init__(self, stop: int) -> None:
        super().__init__(3)
        self.stop = stop

    def shared_index(self, high: int) -> int:
        assert self.stop < high
        return self.stop


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("stop", STOPS)
def test_a_simulated_student_step_evaluates_as_accounted(stop: int, guidance: float, adapter: SpyAdapter) -> None:
    method = dmd2(adapter, teacher_guidance=guidance)
    method.rng = StopAt(stop)
    list(method.losses(analytic_batch(adapter, 2, latents=False), 0))
    assert adapter.grad_modes(method.student) == "n" * stop + "g"
    assert adapter.grad_modes(method.teacher) == ("n" if guidance == 1.0 else "nn")
    assert adapter.grad_modes(method.critic) == "ng"


@pytest.mark.parametrize("stop", STOPS)
def test_a_simulated_critic_step_evaluates_as_accounted(stop: int, adapter: SpyAdapter) -> None:
    method = dmd2(adapter, generator_update_interval=5)
    method.rng = StopAt(stop)
    list(method.losses(analytic_batch(adapter, 2, latents=False), 1))
    assert adapter.grad_modes(method.student) == "n" * (stop + 1)
    assert adapter.grad_modes(method.teacher) == ""
    assert adapter.grad_modes(method.critic) == "g"


@pytest.mark.parametrize(("step", "student", "teacher", "critic"), [(0, "g", "nn", "ng"), (1, "n", "", "g")])
def test_a_step_on_data_evaluates_as_accounted(
    step: int, student: str, teacher: str, critic: str, adapter: SpyAdapter
) -> None:
    method = dmd2(adapter, rollout="data", teacher_guidance=4.5)
    list(method.losses(analytic_batch(adapter, 2), step))
    found = [adapter.grad_modes(handle) for handle in (method.student, method.teacher, method.critic)]
    assert found == [student, teacher, critic]


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_unconditional_branch_is_the_teachers_alone(guidance: float, adapter: SpyAdapter) -> None:
    method = dmd2(adapter, teacher_guidance=guidance)
    list(method.losses(analytic_batch(adapter, 2, captions=("2", "2")), 0))
    negative = [call for call in adapter.calls if float(call.condition.of("analytic")["shift"][0]) == 0.0]
    assert len(negative) == (0 if guidance == 1.0 else 1)
    assert all(call.network is method.teacher.network for call in negative)


def test_teacher_and_critic_are_compared_at_the_same_point(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, teacher_guidance=4.5)
    list(method.losses(analytic_batch(adapter, 3), 0))
    first = adapter.of(method.critic)[0]
    assert len(first.t.unique()) == 3, "one time per sample"
    for call in adapter.of(method.teacher):
        assert torch.equal(call.x_t, first.x_t)
        assert torch.equal(call.t, first.t)


def test_simulating_one_rung_is_the_one_step_generator(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, -0.5, 1.2, ladder=Ladder((1.0,)))
    x0 = method.rollout(analytic_batch(adapter, 4, latents=False)).detach()
    (call,) = adapter.calls
    assert torch.equal(call.t, torch.ones(4))
    torch.testing.assert_close(x0, -0.5 + 1.2 * call.x_t, rtol=1e-5, atol=1e-5)


def test_the_rung_with_gradient_is_uniform(adapter: SpyAdapter) -> None:
    method, batch = dmd2(adapter), analytic_batch(adapter, 1, latents=False)
    draws, counts = 2000, dict.fromkeys(range(1, len(LADDER) + 1), 0)
    for _ in range(draws):
        adapter.calls.clear()
        method.rollout(batch)
        counts[len(adapter.calls)] += 1
    expected = draws / len(LADDER)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 16.3, f"{counts}: chance exceeds this once in a thousand (3 degrees of freedom)"


SHARES = (5, 1, 2, 0)


def test_rollouts_end_at_each_rung_by_its_share(adapter: SpyAdapter) -> None:
    method, batch = dmd2(adapter, rung_shares=SHARES), analytic_batch(adapter, 1, latents=False)
    draws, counts = 500, [0] * len(LADDER)
    for _ in range(draws):
        adapter.calls.clear()
        method.rollout(batch)
        counts[len(adapter.calls) - 1] += 1
    assert [count / draws for count in counts] == pytest.approx([share / 8 for share in SHARES], abs=0.08)


def test_inputs_from_data_are_at_each_rung_by_its_share(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, rollout="data", rung_shares=SHARES)
    method.rollout(analytic_batch(adapter, 4000))
    (call,) = adapter.calls
    found = [float(((call.t - t).abs() < 1e-6).float().mean()) for t in LADDER.times]
    assert found == pytest.approx([share / 8 for share in SHARES], abs=0.03)


def test_no_shares_draw_what_they_always_drew(adapter: SpyAdapter) -> None:
    method = dmd2(adapter)
    stops = [method.rungs.stop(RandomStreams(seed)) for seed in range(20)]
    assert stops == [RandomStreams(seed).shared_index(len(LADDER)) for seed in range(20)]


def test_shares_that_do_not_fit_the_ladder_are_refused(adapter: SpyAdapter) -> None:
    with pytest.raises(UserError, match=r"method\.rung_shares: 2 shares for a ladder of 4 steps \(1, 0.9, 0.75, 0.5\)"):
        dmd2(adapter, rung_shares=(1.0, 1.0))
    with pytest.raises(ValueError, match="at least one ladder step"):
        dmd2(adapter, rung_shares=(0.0, 0.0, 0.0, 0.0))


def test_ranks_with_other_data_stop_at_the_same_rung() -> None:
    calls = []
    for rank in (0, 3):
        adapter = spy()
        method = dmd2(adapter)
        method.rng = RandomStreams(3, rank=rank)
        for step in range(12):
            list(method.losses(analytic_batch(adapter, 2, latents=False), step))
        calls.append(adapter.grad_modes(method.student))
    assert calls[0] == calls[1]
    assert len(set(calls[0])) == 2


@pytest.mark.parametrize("stop", STOPS)
def test_the_students_input_has_the_marginal_of_its_rung(stop: int) -> None:
    adapter = spy((1, 1, 16, 16))
    mean, std, t = -0.5, 1.2, LADDER.times[stop]
    method = dmd2(adapter, mean, std)
    method.rng = StopAt(stop)
    method.rollout(analytic_batch(adapter, 500, latents=False))
    x_t = adapter.calls[-1].x_t.detach()
    assert float(adapter.calls[-1].t[0]) == pytest.approx(t)
    assert float(x_t.mean()) == pytest.approx((1 - t) * mean, abs=0.012)
    assert float(x_t.var()) == pytest.approx((1 - t) ** 2 * std**2 + t**2, rel=0.02)


def test_the_input_from_data_is_data_noised_to_a_rung_per_sample() -> None:
    adapter = spy((1, 1, 16, 16))
    method, batch = dmd2(adapter, rollout="data"), analytic_batch(adapter, 2000)
    method.rollout(batch)
    (call,) = adapter.calls
    for t in LADDER.times:
        rows = call.x_t[(call.t - t).abs() < 1e-6]
        assert len(rows) == pytest.approx(500, abs=80)
        assert float(rows.mean()) == pytest.approx((1 - t) * MEAN, abs=0.02)
        assert float(rows.var()) == pytest.approx((1 - t) ** 2 * STD**2 + t**2, rel=0.03)


def test_a_rollout_on_data_without_data_is_refused(adapter: SpyAdapter) -> None:
    method = dmd2(adapter, rollout="data")
    with pytest.raises(UserError, match="trains on clean latents"):
        next(method.losses(analytic_batch(adapter, 2, latents=False), 0))


def test_only_the_rollout_on_data_asks_for_latents(adapter: SpyAdapter) -> None:
    for rollout in ("data", "simulate"):
        method = dmd2(adapter, rollout=rollout)
        assert method.uses_latents(method.config) == (rollout == "data")


def test_sampling_is_the_training_rollout_without_gradient_or_guidance(adapter: SpyAdapter) -> None:
    method, batch = dmd2(adapter, -0.5, 1.2), analytic_batch(adapter, 3, latents=False)
    method.rng = StopAt(len(LADDER) - 1)
    trained = method.rollout(batch)
    again = StopAt(0)
    sampled = generate(
        method.sampler,
        lambda x_t, t: method.student.velocity(x_t, t, batch.condition),
        again.normal(batch.shape),
        LADDER.times,
        again.normal_like,
    )
    assert torch.equal(sampled, trained)
    assert not sampled.requires_grad
    assert adapter.grad_modes(method.student) == "nnng" + "nnnn"
