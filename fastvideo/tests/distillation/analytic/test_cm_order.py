"""How the error of a consistency model falls with its step: first order with Euler, more with Heun."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from fastvideo.tests.distillation.analytic.test_cm_analytic import ExactStep, FixedRatio, cm, student_gradient, wide
from fastvideo.tests.distillation.toys import MEAN, STD, analytic_batch, spy


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_a_euler_steps_gradient_falls_with_the_square_of_the_step(sigma: float) -> None:
    adapter, found = spy((1, 1, 16, 16)), []
    for ratio in (0.97, 0.9925, 0.998125):
        method = cm(adapter, cls=FixedRatio, metric="squared", weighting="none", **wide(sigma))
        method.fixed = ratio
        # Relative to d^2 the gradient of the mean is d times its derivative: of the order of the step squared.
        found.append(float(student_gradient(method, analytic_batch(adapter, 256)).norm()))
        adapter.calls.clear()
    for coarse, fine in itertools.pairwise(found):
        assert coarse / fine == pytest.approx(16, rel=0.35)


def test_consistency_training_has_a_loss_at_the_truth_and_a_gradient_that_vanishes_with_the_step() -> None:
    """The pair shares noise and data, so their difference is noise too; but on average it points nowhere."""
    adapter, losses, gradients = spy((1, 1, 32, 32)), [], []
    for ratio in (0.95, 0.9875, 0.996875):
        method = cm(adapter, teacher=False, cls=FixedRatio, metric="squared", weighting="none", **wide(1.5))
        method.fixed = ratio
        batch = analytic_batch(adapter, 256)
        gradients.append(float(student_gradient(method, batch).norm()))
        losses.append(float(next(method.losses(batch, 0)).value.detach()))
        adapter.calls.clear()
    assert min(losses) > 0
    assert gradients[0] > 2.5 * gradients[1] > 2.5 * 2.5 * gradients[2]
    assert losses[1] / losses[2] == pytest.approx(16, rel=0.35)


def fitted_std(**options: Any) -> float:
    """Where the gradient of the student's scale vanishes, by bisection on the same random numbers every time."""
    adapter, ratio = spy((1, 1, 16, 16)), options.pop("ratio")
    batch = analytic_batch(adapter, 128)
    cls = options.pop("cls", FixedRatio)
    low, high = 0.2, 0.7
    for _ in range(9):
        middle = math.sqrt(low * high)
        method = cm(adapter, MEAN, middle, cls=cls, metric="squared", weighting="inverse_step", **options)
        if cls is FixedRatio:
            method.fixed = ratio
        positive = float(student_gradient(method, batch)[1]) > 0
        low, high = (low, middle) if positive else (middle, high)
        adapter.calls.clear()
    return math.sqrt(low * high)


def test_the_fitted_scale_errs_to_first_order_with_euler_and_less_with_heun() -> None:
    """Noise levels from 0.3 up, where no step of these ratios reaches the data."""
    options = {"log_sigma_mean": 0.5, "log_sigma_std": 1.0, "sigma_range": (0.3, 80.0)}
    coarse, fine = (STD - fitted_std(ratio=ratio, **options) for ratio in (0.96, 0.99))
    assert coarse > 0, "Euler steps lose variance"
    assert coarse / fine == pytest.approx(4, rel=0.35)
    assert abs(STD - fitted_std(ratio=0.96, solver="heun", **options)) < coarse / 4


class SmallExactStep(ExactStep):
    """The exact step at a ratio of 0.96."""

    ratio = 0.96  # type: ignore[assignment]


def test_an_exact_step_fits_the_scale_exactly() -> None:
    options = {"log_sigma_mean": 0.5, "log_sigma_std": 1.0, "sigma_range": (0.3, 80.0)}
    assert fitted_std(ratio=0.96, cls=SmallExactStep, **options) == pytest.approx(STD, abs=1.5e-3)
