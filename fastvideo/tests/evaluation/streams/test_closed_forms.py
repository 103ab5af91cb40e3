"""Drift and exposure bias of first-order processes, whose variances are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvideo.evaluation.frechet import Moments
from fastvideo.evaluation.statistics import resample_counts
from fastvideo.evaluation.streams.series import frechet_series, mean_series, quantile, slope_weights

SLOPE, ERROR = 0.9, 0.05
STREAMS, FRAMES = 20_000, 64


def process(slope: float) -> Tensor:
    """Streams ``[N, F, 1]`` from the real stationary law, with real noise and a slope of the student's own."""
    draws = torch.randn(STREAMS, FRAMES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, found = draws[:, 0], []
    for frame in range(FRAMES):
        x = x if frame == 0 else slope * x + (1 - SLOPE**2) ** 0.5 * draws[:, frame]
        found.append(x)
    return torch.stack(found, dim=1).unsqueeze(-1)


def variance(frame: int) -> float:
    """Of a student that began with a real frame: a geometric approach to (1 - a^2) / (1 - (a + d)^2)."""
    own, noise = (SLOPE + ERROR) ** 2, 1 - SLOPE**2
    end = noise / (1 - own)
    return end + own**frame * (1 - end)


@pytest.fixture(scope="module")
def counts() -> Tensor:
    return resample_counts(STREAMS, 0, resamples=20)


def test_exposure_bias_of_a_wrong_slope(counts: Tensor) -> None:
    """The drift of the distance finds the stationary variance 1.95; on real pasts it is that of one step, 1.09."""
    assert variance(10**6) == pytest.approx(1.95, abs=0.005)
    real, own = process(SLOPE), process(SLOPE + ERROR)
    at, reference = (0, 1, 8, 63), Moments(torch.zeros(1).double(), torch.ones(1, 1).double())
    found = frechet_series(at, own[:, at], reference, counts)
    for place, frame in enumerate(at):
        assert float(found.values[place]) == pytest.approx((variance(frame) ** 0.5 - 1) ** 2, abs=0.01)
    taught = real[:, 62] * (SLOPE + ERROR) + (real[:, 63] - SLOPE * real[:, 62])
    one_step = frechet_series((63,), taught[:, None], reference, counts)
    bias = float(found.values[-1] - one_step.values[0])
    assert bias == pytest.approx((variance(63) ** 0.5 - 1) ** 2 - (variance(1) ** 0.5 - 1) ** 2, abs=0.01)
    exact = frechet_series(at, real[:, at], reference, counts)
    assert float(exact.values.max()) < 1e-3


def test_slopes_and_intervals(counts: Tensor) -> None:
    noise = torch.randn(STREAMS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    series = mean_series((0, 10, 20, 30, 40), 1 + 0.03 * torch.arange(5) + noise, counts)
    assert series.slope.value == pytest.approx(0.3, abs=0.06)
    assert series.slope.low < series.slope.value < series.slope.high
    assert series.drop.value == pytest.approx(-0.12, abs=0.03)
    assert float(torch.arange(7.0, dtype=torch.float64) @ slope_weights(range(7))) == pytest.approx(100.0)


def test_quantiles_leave_out_nothing_but_missing_values() -> None:
    values = torch.tensor([3.0, torch.nan, 1.0, torch.inf, 2.0])
    counts = torch.tensor([[1.0, 1, 1, 1, 1], [3, 0, 0, 2, 0], [0, 5, 0, 0, 0]], dtype=torch.float64)
    value, resampled = quantile(values, counts, 0.5)
    assert float(value) == 2.0
    assert resampled[:2].tolist() == [2.0, 3.0]
    assert resampled[2].isnan()
    assert float(quantile(values, counts, 0.9)[0]) == float("inf")
