"""Truncated consistency models against closed forms: who answers where, who gets gradient, what holds the student."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.consistency_model.tcm import TCMConfig, TCMMethod, truncated_student
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, UserError
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


class Constant(nn.Module):
    """The velocity form of a student whose clean estimate is always the same number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return (x_t - self.value) / t.view(-1, 1, 1, 1, 1)


def tcm(
    adapter: SpyAdapter,
    network: nn.Module | None = None,
    *,
    teacher: bool = False,
    ladder: Ladder = LADDER,
    **options: Any,
) -> TCMMethod:
    """A second stage over the exact first stage, with the given student or one at the truth."""
    networks = {"student": network or gaussian(adapter, "consistency"), "cm_teacher": gaussian(adapter, "consistency")}
    networks |= {"teacher": gaussian(adapter, "denoiser")} if teacher else {}
    handles = [RoleHandle(name, adapter, net, trainable=name == "student") for name, net in networks.items()]
    return TCMMethod(TCMConfig(**{"teacher_guidance": 1.0, **options}), ModelBundle(handles), ladder, RandomStreams(3))


def test_a_sample_below_the_transition_gives_the_student_no_gradient(adapter: SpyAdapter) -> None:
    method = tcm(adapter, gaussian(adapter, "consistency", -0.5, 1.2))
    below = float(torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)))
    t, x_t = torch.tensor([0.1, below, 0.5, 0.9]), torch.randn(4, 1, 1, 4, 4)
    x0 = method.consistency(x_t, t, adapter.conditioner.negative(4))
    exact = gaussian(adapter, "consistency")(x_t, t, torch.zeros(4))
    torch.testing.assert_close(x0[:2], (x_t - t.view(-1, 1, 1, 1, 1) * exact)[:2].detach())
    reached = [
        torch.autograd.grad(x0[i].sum(), method.student.network.mean, retain_graph=True)[0].abs().item()
        for i in range(4)
    ]
    assert reached[:2] == [0.0, 0.0]
    assert min(reached[2:]) > 0


def test_the_function_is_continuous_where_both_are_the_same(adapter: SpyAdapter) -> None:
    method, x_t = tcm(adapter), torch.randn(1, 1, 1, 4, 4)
    for handle in method.bundle:
        handle.network.double()
    sides = [
        method.consistency(x_t.double(), torch.tensor([t], dtype=torch.float64), adapter.conditioner.negative(1))
        for t in (0.5 - 1e-9, 0.5)
    ]
    torch.testing.assert_close(*sides, rtol=0, atol=1e-7)


def test_only_the_boundary_tells_a_constant_student_from_a_good_one(adapter: SpyAdapter) -> None:
    """Steps so small that no free sample's lower level is below the transition."""
    options = {"max_ratio": 0.9999, "weighting": "none", "log_sigma_mean": 1.0, "degrees_of_freedom": 3.0}
    losses = {}
    for weight in (0.0, 0.1):
        method = tcm(adapter, Constant(MEAN), boundary_weight=weight, **options)
        (loss,) = method.losses(analytic_batch(adapter, 64), 0)
        losses[weight] = float(loss.value.detach())
    assert losses[0.0] < 1e-4, "it agrees with itself everywhere: collapse"
    assert losses[0.1] > 0.05, "at the transition it has to agree with the first stage"


def test_a_batch_of_eight_has_exactly_two_samples_at_the_transition(adapter: SpyAdapter) -> None:
    method = tcm(adapter)
    where = set()
    for _ in range(20):
        t, r = method.times(8)
        assert (t == 0.5).sum() == 2
        assert (t >= 0.5).all()
        assert (r[t == 0.5] < 0.5).all()
        where |= set((t == 0.5).nonzero().flatten().tolist())
    assert len(where) > 4, "which samples they are is drawn anew"
    assert [method.boundary_count(n) for n in (1, 2, 3, 4, 8, 32)] == [1, 1, 1, 1, 2, 8]


def test_each_part_of_the_loss_is_a_mean_over_its_own_samples(adapter: SpyAdapter) -> None:
    method = tcm(adapter, boundary_weight=0.1)
    losses, t = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0.7, 0.9, 0.5, 0.5])
    assert float(method.reduce(losses, t)) == pytest.approx(2.0 + 0.1 * 20.0)
    assert float(method.reduce(losses[:2], t[:2])) == pytest.approx(2.0)


def test_noise_levels_follow_the_truncated_heavy_tail(adapter: SpyAdapter) -> None:
    """Against a Student t of three degrees of freedom, which has a closed form, and the shape at 0.01."""
    config = TCMConfig(degrees_of_freedom=3.0, log_sigma_mean=0.5, log_sigma_std=0.7)
    uniform = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    z = (truncated_student(uniform, config).log() - 0.5) / 0.7

    def cdf(z: Tensor) -> Tensor:
        x = z / math.sqrt(3)
        return 0.5 + (x / (1 + x**2) + torch.atan(x)) / math.pi

    low, high = (torch.tensor((math.log(s) - 0.5) / 0.7) for s in (1.0, 80.0))
    torch.testing.assert_close((cdf(z) - cdf(low)) / (cdf(high) - cdf(low)), uniform, rtol=0, atol=2e-5)
    levels = tcm(adapter).noise_levels(4000)
    assert 1.0 <= float(levels.min()) < float(levels.max()) <= 80.0
    free = levels[levels > 1.0].log()
    # Nearly 1 / z beyond its scale of 0.02: equal shares between levels whose logarithms have equal ratios.
    assert float((free > 1.0).double().mean()) == pytest.approx(math.log(4.38) / math.log(4.38 / 0.02 * 2), abs=0.06)


@pytest.mark.parametrize(("teacher", "expected"), [(False, ""), (True, "n")])
def test_the_calls_are_as_accounted(teacher: bool, expected: str, adapter: SpyAdapter) -> None:
    method = tcm(adapter, gaussian(adapter, "consistency", -0.5, 1.2), teacher=teacher)
    list(method.losses(analytic_batch(adapter, 8), 0))
    assert adapter.grad_modes(method.student) == "ng"
    assert adapter.grad_modes(method.first_stage) == "nn"
    if teacher:
        assert adapter.grad_modes(method.bundle["teacher"]) == expected


@pytest.mark.nightly
def test_a_two_parameter_student_reaches_the_truth() -> None:
    adapter = spy((1, 1, 1, 16))
    options = {"max_ratio": 0.98, "metric": "squared", "weighting": "none", "degrees_of_freedom": 3.0}
    method = tcm(
        adapter, gaussian(adapter, "consistency", -0.5, 1.2), log_sigma_mean=0.7, boundary_weight=1.0, **options
    )

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 400, {"student": 0.04}, final_rate=0.05)
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.03)


def test_a_ladder_below_the_transition_is_refused(adapter: SpyAdapter) -> None:
    with pytest.raises(UserError, match=r"times \[0.25\] are below the transition 0.5"):
        tcm(adapter, ladder=Ladder((1.0, 0.5, 0.25)))
    tcm(adapter, ladder=Ladder((1.0, 0.5, 0.25)), transition_sigma=1 / 3)
    with pytest.raises(UserError, match=r"sigma_range: ends at 0.9"):
        tcm(adapter, sigma_range=(0.002, 0.9))
