"""Streams of correlated Gaussian frames against closed forms: rollouts, exposure bias, switches of the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import FrameConsistency
from fastvideo.distillation.causal_rollout import recache, switched
from fastvideo.distillation.chunks import Past, Reach
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.rollout import Velocity, few_step
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import Condition
from fastvideo.sampling_ranges import OnSwitch
from fastvideo.tests.distillation.toys import LADDER

A = 0.9
PIXELS = 150


class Family(AnalyticAdapter):
    """Frames with correlation ``A``, mean 0 and variance 1."""

    def __init__(self, frames: int, pixels: int = PIXELS) -> None:
        super().__init__(AnalyticConfig(means=(0.0,), stds=(1.0,), correlation=A, shape=(1, frames, pixels, pixels)))


def rolled(network: FrameConsistency, frames: int, reach: Reach, count: int = 4, seed: int = 1) -> Tensor:
    """Frames ``[count * pixels, frames]`` of a student's rollout."""
    family = Family(frames)
    spec = SamplerSpec(LADDER.times, 1.0, "renoise", reach)
    condition, shape = family.conditioner.encode_prompts([""] * count), family.codec.latent_shape
    seeds = [seed + i for i in range(count)]
    video = sample(Denoiser(family, network), SampleNoise(seeds), shape, spec, condition)
    return video.movedim(2, -1).reshape(-1, frames)


def covariance(a: float, frames: int, variance: float = 1.0) -> Tensor:
    return variance * a ** torch.tensor([[abs(i - j) for j in range(frames)] for i in range(frames)]).float()


@pytest.mark.parametrize("reach", [Reach(1), Reach(1, window=1), Reach(1, window=1, sink=1), Reach(2)], ids=str)
def test_a_rollout_of_the_exact_student_has_the_covariance_of_the_world(reach: Reach) -> None:
    found = rolled(FrameConsistency(0.0, 1.0, A), 3, reach, 6).T.cov()
    torch.testing.assert_close(found, covariance(A, 3), rtol=0, atol=0.015)


def test_it_keeps_it_for_long() -> None:
    """64 frames with a window of two: the covariance of each frame with the ones around it, at every place."""
    found = rolled(FrameConsistency(0.0, 1.0, A), 64, Reach(1, window=2)).T.cov()
    for apart in (0, 1, 5, 20):
        mine = found.diagonal(apart)
        assert float((mine - A**apart).abs().max()) < 0.04
        assert float(mine.mean()) == pytest.approx(A**apart, abs=0.01)


class SecondOrder(FrameConsistency):
    """AR(2) frames ``x_k = p x_{k-1} + q x_{k-2} + noise``, variance 1."""

    p, q = 0.5, 0.4

    def correlations(self, positions: Sequence[int]) -> Tensor:
        rho = [1.0, self.p / (1 - self.q)]
        while len(rho) <= max(positions) - min(positions):
            rho.append(self.p * rho[-1] + self.q * rho[-2])
        return torch.tensor([[rho[abs(i - j)] for j in positions] for i in positions])


def test_a_window_that_is_too_short_is_the_best_predictor_with_that_window() -> None:
    """AR(2) frames: two past frames suffice; one gives the AR(1) process with the same neighbours."""
    network = SecondOrder(0.0, 1.0, A)
    two, one = (rolled(network, 5, Reach(1, window=window), 8).T.cov() for window in (2, 1))
    torch.testing.assert_close(two, network.correlations(range(5)), rtol=0, atol=0.015)
    first = network.p / (1 - network.q)
    torch.testing.assert_close(one, covariance(first, 5), rtol=0, atol=0.015)
    assert float(one[0, 2]) < float(two[0, 2]) - 0.03


def biased(slope: float) -> FrameConsistency:
    """A student that predicts ``slope x_{k-1}`` with the right noise: its own frames have another variance."""
    return FrameConsistency(0.0, math.sqrt((1 - A**2) / (1 - slope**2)), slope)


def test_a_student_with_a_wrong_slope_drifts_as_its_recursion_says() -> None:
    """From a real frame: ``V_k = V + (1 - V) slope^2k`` with ``V = (1 - a^2) / (1 - slope^2)``, 1.95 for .95."""
    slope, frames, family = 0.95, 40, Family(1)
    student, condition = Denoiser(family, biased(slope)), family.conditioner.encode_prompts([""])
    noise = SampleNoise([5])
    past, variances = Past(Reach(1, window=1)), []
    chunk = noise.draw(family.codec.latent_shape)
    for _ in range(frames):
        past = student.commit(past, chunk, condition)
        with torch.no_grad():
            chunk = few_step(on(student, past, condition), noise.draw(family.codec.latent_shape), (1.0,), noise.like)
        variances.append(float(chunk.var()))
    limit = (1 - A**2) / (1 - slope**2)
    assert limit == pytest.approx(1.95, abs=0.005)
    expected = [limit + (1 - limit) * slope ** (2 * k) for k in range(1, frames + 1)]
    assert variances == pytest.approx(expected, rel=0.1)
    assert variances[-1] > 1.8


def on(student: Denoiser, past: Past, condition: Condition) -> Velocity:
    """The velocity of the chunk behind a past."""
    return partial(student.velocity, condition=condition, context=past)


@pytest.mark.parametrize("policy", ["keep", "recache"])
def test_after_a_switch_of_the_prompt_the_mean_moves_by_the_recursion(policy: OnSwitch) -> None:
    """``mu' - a^m (mu' - mu)``: half way after 6.6 frames. A past of frames alone is the same recached."""
    family, before, after = Family(1), -1.0, 2.0
    student = Denoiser(family, FrameConsistency(0.0, 1.0, A))
    old, new = (family.conditioner.encode_prompts([str(mean)]) for mean in (before, after))
    noise = SampleNoise([7])
    past = student.commit(Past(Reach(1, window=4)), before + noise.draw(family.codec.latent_shape), old)
    past, means = switched(student, past, new, policy), []
    for _ in range(8):
        with torch.no_grad():
            chunk = few_step(on(student, past, new), noise.draw(family.codec.latent_shape), (1.0,), noise.like)
        past = student.commit(past, chunk, new)
        means.append(float(chunk.mean()))
    expected = [after - A**m * (after - before) for m in range(1, 9)]
    assert means == pytest.approx(expected, abs=0.03)
    half = math.log(2) / math.log(1 / A)
    assert half == pytest.approx(6.58, abs=0.01)
    assert means[5] < (before + after) / 2 < means[7]


def test_what_each_policy_leaves_of_the_past() -> None:
    family = Family(1, pixels=2)
    student = Denoiser(family, FrameConsistency(0.0, 1.0, A))
    condition, past = family.conditioner.encode_prompts([""]), Past(Reach(1, window=3, sink=1))
    for index in range(8):
        past = student.commit(past, torch.full((1, 1, 1, 2, 2), float(index)), condition)
    policies: tuple[OnSwitch, ...] = ("keep", "recache", "flush", "cut")
    left = {policy: switched(student, past, condition, policy) for policy in policies}
    starts = {policy: [piece.start for piece in found.pieces] for policy, found in left.items()}
    assert starts == {"keep": [0, 5, 6, 7], "recache": [0, 5, 6, 7], "flush": [0, 7], "cut": []}
    assert {policy: found.length for policy, found in left.items()} == {"keep": 8, "recache": 8, "flush": 8, "cut": 0}
    assert left["keep"] is past
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(past.pieces, left["recache"].pieces, strict=True))
    assert left["cut"].reach == past.reach
    assert recache(student, Past(Reach(1)), condition) == Past(Reach(1))
