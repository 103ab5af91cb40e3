"""Knowledge distillation against closed forms: where the Gaussian's walk ends is known, and so is the best student."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.data.trajectories import joined
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.knowledge_distillation.kd import KDConfig, KDMethod
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.samplers import euler, generate
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, UserError
from fastvideo.tests.distillation.analytic.mixtures import learned_velocity, mode_shares, three_modes, wasserstein_1
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


class Affine(nn.Module):
    """A one-step student ``x0 = intercept + slope x`` in velocity form."""

    def __init__(self, intercept: float, slope: float) -> None:
        super().__init__()
        self.intercept, self.slope = (nn.Parameter(torch.tensor(value)) for value in (intercept, slope))

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return (x_t - self.intercept - self.slope * x_t) / t.view(-1, 1, 1, 1, 1)


def kd(adapter: SpyAdapter, network: nn.Module | None = None, ladder: Ladder = LADDER, **options: Any) -> KDMethod:
    """KD of the given student, or of one at the truth."""
    student = RoleHandle("student", adapter, network or gaussian(adapter, "consistency"), trainable=True)
    return KDMethod(KDConfig(**options), ModelBundle([student]), ladder, RandomStreams(3))


def one_step(batch: Batch) -> Batch:
    """The batch with the first state of its walks alone."""
    assert batch.trajectory is not None
    walk = batch.trajectory
    return replace(batch, trajectory=Trajectory(walk.states[:, :1], walk.times[:, :1]))


@pytest.mark.parametrize(("shuffled", "expected"), [(False, (MEAN, STD)), (True, (MEAN, 0.0))])
def test_a_linear_student_finds_slope_and_intercept_and_without_the_pairing_the_mean(
    shuffled: bool, expected: tuple[float, float]
) -> None:
    adapter = spy((1, 1, 1, 16))
    method = kd(adapter, Affine(-0.5, 0.9), Ladder((1.0,)))

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        batch = one_step(analytic_batch(adapter, 64, seed=step))
        assert batch.x0 is not None
        return replace(batch, x0=batch.x0.roll(1, 0)) if shuffled else batch

    train(method, batches, 250, {"student": 0.05})
    student = method.bundle["student"].network
    assert (student.intercept.item(), student.slope.item()) == pytest.approx(expected, abs=0.01)


def walk(adapter: Any, steps: int, noise: Tensor, kept: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """States and end of the exact velocity's Euler walk."""
    teacher = adapter.folder.load_network("denoiser").requires_grad_(False)
    velocity = partial(adapter.velocity, teacher, condition=adapter.conditioner.encode_prompts(("",) * len(noise)))
    return recorded(velocity, noise, joined(uniform_ladder(steps).times, kept), kept)


def recorded(velocity: Any, noise: Tensor, times: tuple[float, ...], kept: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The states that Euler's steps meet at the times ``kept``, ``[B, K, C, F, H, W]``, and their end."""
    states, left = [], iter(times)

    def seen(x: Tensor, t: Tensor) -> Tensor:
        if next(left) in kept:
            states.append(x)
        return velocity(x, t)

    end = euler(seen, noise, times)
    return torch.stack(states, dim=1), end


def test_the_end_of_a_walk_is_the_quantile_of_its_noise_and_doubling_the_steps_halves_the_error() -> None:
    adapter = three_modes((1, 1, 1, 1))
    noise = torch.linspace(-2.3, 2.3, 64).view(-1, 1, 1, 1, 1)
    exact = adapter.data_of(noise, adapter.conditioner.encode_prompts(("",) * 64))
    errors = [float((walk(adapter, n, noise, (1.0,))[1] - exact).abs().mean()) for n in (48, 96, 192)]
    assert errors[0] < 0.06
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.3)


def test_every_stored_state_flows_to_the_stored_end() -> None:
    adapter = three_modes((1, 1, 1, 1))
    noise = torch.linspace(-2.0, 2.0, 32).view(-1, 1, 1, 1, 1)
    states, end = walk(adapter, 400, noise, LADDER.times)
    exact = adapter.folder.load_network("consistency").requires_grad_(False)
    assert torch.equal(states[:, 0], noise)
    for i, t in enumerate(LADDER.times):
        x_t = states[:, i]
        flowed = x_t - t * exact(x_t, full_time(x_t, t), torch.zeros(32))
        assert float((flowed - end).abs().mean()) < 0.02, t


def test_the_walk_comes_to_the_ladders_times_exactly_and_to_no_others() -> None:
    grid = joined(uniform_ladder(48).times, (1.0, 0.9, 0.7500001, 1 / 3))
    assert {1.0, 0.9, 0.7500001, 1 / 3} <= set(grid)
    assert 0.75 not in grid, "a rung takes the place of what it nearly is"
    assert len(grid) == 48 + 1, "0.9 alone is new: 16 / 48 and 36 / 48 were there"
    noise = torch.randn(3, 1, 1, 2, 2)
    states, end = recorded(lambda x, t: 0.5 * x, noise, (1.0, 0.6, 0.5), (1.0, 0.5))
    torch.testing.assert_close(states[:, 1], noise * (1 - 0.4 * 0.5) * (1 - 0.1 * 0.5))
    torch.testing.assert_close(end, euler(lambda x, t: 0.5 * x, noise, (1.0, 0.6, 0.5)))


def test_what_several_euler_steps_cost_where_the_walk_is_curved() -> None:
    """Re-noised ends are distributed as the stored states are; Euler's straight line to the end leaves the walk.

    The walk's deviation at time t is ``sqrt(v_t)``, the line's ``alpha s + t``: on this ladder 0.4 becomes 0.534.
    """
    adapter = spy((1, 1, 16, 16))
    method, batch = kd(adapter), analytic_batch(adapter, 256)
    assert batch.trajectory is not None
    velocity = partial(method.bundle["student"].velocity, condition=batch.condition)
    noise, streams = batch.trajectory.states[:, 0], RandomStreams(1)
    ends = {kind: generate(kind, velocity, noise, LADDER.times, streams.normal_like) for kind in ("euler", "renoise")}
    assert method.sampler == "euler"
    assert float(ends["renoise"].std()) == pytest.approx(STD, rel=0.01)
    assert float(ends["euler"].std()) == pytest.approx(0.534, rel=0.01)


def test_with_the_exact_student_one_step_gives_the_stored_end_whatever_the_sampler() -> None:
    adapter = spy((1, 1, 8, 8))
    method, batch = kd(adapter), analytic_batch(adapter, 16)
    assert batch.trajectory is not None
    assert batch.x0 is not None
    velocity = partial(method.bundle["student"].velocity, condition=batch.condition)
    noise, streams = batch.trajectory.states[:, 0], RandomStreams(1)
    for kind in ("euler", "renoise"):
        end = generate(kind, velocity, noise, (1.0,), streams.normal_like)
        torch.testing.assert_close(end, batch.x0, rtol=0, atol=1e-5)
    (loss,) = method.losses(batch, 0)
    assert float(loss.value.detach()) < 1e-10, "and every other state leads there too"


def test_each_sample_starts_from_a_state_of_its_own_at_that_states_time(adapter: SpyAdapter) -> None:
    """The number of the state is written into it; the student must be told the time that belongs to that number."""
    batch = analytic_batch(adapter, 64)
    numbers = torch.arange(4.0).view(1, 4, 1, 1, 1, 1).expand(64, 4, *adapter.codec.latent_shape)
    times = torch.tensor(LADDER.times).expand(64, -1)
    list(kd(adapter).losses(replace(batch, trajectory=Trajectory(numbers, times)), 0))
    (call,) = adapter.calls
    seen = call.x_t[:, 0, 0, 0, 0].long()
    assert torch.equal(call.t, torch.tensor(LADDER.times)[seen])
    assert set(seen.tolist()) == {0, 1, 2, 3}
    assert adapter.grad_modes(RoleHandle("student", adapter, call.network)) == "g"


def test_the_gradient_is_the_error_over_the_number_of_elements(adapter: SpyAdapter) -> None:
    """In x0: ``L = 1/2 mean (x0 - end)^2``, so ``dL/du = -t (x0 - end) / numel``."""
    method, batch = kd(adapter, gaussian(adapter, "consistency", -0.5, 1.2)), analytic_batch(adapter, 8)
    (loss,) = method.losses(batch, 0)
    loss.value.backward()
    (call,) = adapter.calls
    t = call.t.view(-1, 1, 1, 1, 1)
    error = call.x_t - t * call.output - batch.x0
    torch.testing.assert_close(call.output.grad, (-t * error / error.numel()).detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("times", [(1.0, 0.9, 0.75, 0.4999), (1.0, 0.9, 0.75), (0.999, 0.937, 0.833, 0.624)])
def test_states_at_other_times_are_refused_and_the_nearest_is_not_taken(
    times: tuple[float, ...], adapter: SpyAdapter
) -> None:
    batch = analytic_batch(adapter, 2)
    assert batch.trajectory is not None
    walk = Trajectory(batch.trajectory.states[:, : len(times)], torch.tensor(times).expand(2, -1))
    with pytest.raises(UserError, match=r"stored states are at times \[.*the ladder has \[1.0, 0.9"):
        next(kd(adapter).losses(replace(batch, trajectory=walk), 0))


def test_plain_videos_and_prompts_are_refused(adapter: SpyAdapter) -> None:
    batch = analytic_batch(adapter, 2)
    for wrong in (replace(batch, trajectory=None), analytic_batch(adapter, 2, latents=False)):
        with pytest.raises(UserError, match="precompute-trajectories"):
            next(kd(adapter).losses(wrong, 0))


@pytest.mark.nightly
def test_a_two_parameter_student_reaches_the_truth_from_every_rung() -> None:
    adapter = spy((1, 1, 1, 16))
    method = kd(adapter, gaussian(adapter, "consistency", -0.5, 1.2))

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 400, {"student": 0.03})
    assert moments(method.bundle["student"]) == pytest.approx((MEAN, STD), abs=0.01)


@pytest.mark.nightly
def test_a_one_step_student_keeps_all_modes_of_a_mixture() -> None:
    """A learned network from the learned velocity, one step, on exact pairs: Wasserstein-1 below 0.05."""
    adapter = three_modes()
    student = RoleHandle("student", adapter, learned_velocity(adapter, 600, gain=5.0), trainable=True)
    method = KDMethod(KDConfig(), ModelBundle([student]), Ladder((1.0,)), RandomStreams(3))
    noise = torch.randn((2000, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(0))
    ends = adapter.data_of(noise, adapter.conditioner.encode_prompts(("",) * 2000))
    condition = adapter.conditioner.encode_prompts(("",) * 100)

    def batches(step: int) -> Batch:
        rows = slice(step % 20 * 100, step % 20 * 100 + 100)
        walk = Trajectory(noise[rows, None], torch.ones(100, 1))
        return Batch((100, *adapter.codec.latent_shape), condition, condition, ends[rows], walk)

    train(method, batches, 1500, {"student": 2e-3})
    fresh = torch.randn((500, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(1))
    made = student.x0(fresh, torch.ones(500), adapter.conditioner.encode_prompts(("",) * 500))
    assert wasserstein_1(made) < 0.05
    assert mode_shares(made) == pytest.approx([0.3, 0.4, 0.3], abs=0.04)
