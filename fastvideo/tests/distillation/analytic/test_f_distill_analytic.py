"""f-distill's weights against quadrature of the divergences that they are derived from, and its normaliser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.methods.distribution_matching.f_distill import WEIGHTS
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, UserError
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, analytic_batch, moments, spy, toy_method, train

SIGMA, TRUTH, STUDENT = 0.9, 0.7, 0.2
SLOPES = {
    "reverse_kl": (-0.61728, 1.0),
    "forward_kl": (-0.61728, 1.0),
    "jensen_shannon": (-0.28647, 1.0),
    "jeffreys": (-1.23457, 1.0),
    "squared_hellinger": (-0.14848, 0.25),
    "neyman": (-1.68096, 2.0),
}
"""``d D_f(p || q) / d m`` of N(0.7, 0.9^2) and N(m, 0.9^2) at m = 0.2, and the constant that the table leaves out."""
GENERATORS = {
    "reverse_kl": lambda r: -torch.log(r),
    "forward_kl": lambda r: r * torch.log(r),
    "jensen_shannon": lambda r: r * torch.log(r) - (1 + r) * torch.log((1 + r) / 2),
    "jeffreys": lambda r: (r - 1) * torch.log(r),
    "squared_hellinger": lambda r: 1 - torch.sqrt(r),
    "softened_reverse_kl": lambda r: (1 + r) * torch.log((1 + r) / r),
    "neyman": lambda r: (1 - r) ** 2 / r,
}
"""``f`` of ``D_f(p || q) = E_q f(p / q)``."""
X = torch.linspace(-12, 12, 40_001, dtype=torch.float64)


def density(mean: Tensor | float) -> Tensor:
    return torch.exp(-0.5 * ((X - mean) / SIGMA) ** 2) / (SIGMA * (2 * torch.pi) ** 0.5)


def method_of(adapter: SpyAdapter, divergence: str = "jensen_shannon", seed: int = 3, **options: Any) -> Any:
    rng = RandomStreams(seed)
    return toy_method("f_distill", adapter, mean=-0.3, std=0.9, rng=rng, divergence=divergence, **options)


@pytest.mark.parametrize("name", SLOPES)
def test_the_weighted_score_difference_is_the_slope_of_the_divergence(name: str) -> None:
    wanted, constant = SLOPES[name]
    q = density(STUDENT)
    ratio = density(TRUTH) / q
    difference = (TRUTH - X) / SIGMA**2 - (STUDENT - X) / SIGMA**2  # s_p - s_q
    found = -torch.trapezoid(q * constant * WEIGHTS[name](ratio) * difference, X)
    assert float(found) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_is_the_curvature_of_its_divergence(name: str) -> None:
    """``h(r) = f''(r) r^2`` up to a constant, with ``f''`` by autograd."""
    r = torch.tensor([0.2, 0.7, 1.0, 2.5, 9.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    ratio = second * r.detach() ** 2 / WEIGHTS[name](r.detach())
    torch.testing.assert_close(ratio, ratio[:1].expand(5), rtol=1e-9, atol=1e-9)


def test_the_reverse_kl_is_dmd2_with_a_discriminator_to_the_bit(adapter: SpyAdapter) -> None:
    batch, found = analytic_batch(adapter, 4, captions=("0", "1", "0.5", "-1")), []
    for name, options in (("f_distill", {"divergence": "reverse_kl"}), ("dmd2_gan", {})):
        method = toy_method(name, adapter, mean=-0.3, std=0.9, rng=RandomStreams(3), gan_weight=0.01, **options)
        for step in range(3):
            for loss in method.losses(batch, step):
                loss.value.backward()
        found.append([p.grad for handle in method.bundle for p in handle.network.parameters() if p.grad is not None])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_mean_one_no_gradient_and_are_one_for_equal_logits(name: str, adapter: SpyAdapter) -> None:
    logits, t = 3 * normal((64, 2), seeded(1)).requires_grad_(), RandomStreams(4).uniform(64)
    weights = method_of(adapter, name).weights(logits, t)
    assert weights.shape == (64, 1, 1, 1, 1)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-6)
    assert bool((weights.std() > 0.01) == (name != "reverse_kl"))
    equal = method_of(adapter, name).weights(torch.full((64, 2), 1.7), t)
    torch.testing.assert_close(equal, torch.ones_like(equal))


def test_the_ratio_is_the_exponential_of_the_mean_logit_within_bounds(adapter: SpyAdapter) -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-50.0, -50.0], [50.0, 50.0]])
    found = method_of(adapter, "forward_kl", ratio_bins=1).weights(logits, torch.full((4,), 0.5)).flatten()
    wanted = torch.tensor([0.5, 0.0]).exp()
    wanted = torch.cat([wanted, torch.tensor([0.1, 20.0])])
    torch.testing.assert_close(found, wanted / wanted.mean())


def test_ratios_are_normalised_by_the_running_mean_of_their_noise_level(adapter: SpyAdapter) -> None:
    method = method_of(adapter, ratio_bins=2, ratio_decay=0.75)
    t = torch.tensor([0.1, 0.2, 0.9])
    first = method.normalised(torch.tensor([1.0, 3.0, 8.0]), t)
    torch.testing.assert_close(first, torch.tensor([0.5, 1.5, 1.0]))
    second = method.normalised(torch.tensor([4.0, 8.0]), torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(method.means, torch.tensor([0.75 * 2 + 0.25 * 6, 8.0]))
    torch.testing.assert_close(second, torch.tensor([4.0, 8.0]) / 3.0)
    assert method.normalised(torch.tensor([8.0]), torch.tensor([1.0])).item() == pytest.approx(1.0), "t = 1 has a bin"
    other = method_of(adapter, ratio_bins=2)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.means, method.means)


def test_a_sample_alone_in_its_bin_still_weighs_unless_nothing_is_remembered(adapter: SpyAdapter) -> None:
    t, logits = torch.tensor([0.15, 0.85]), torch.tensor([[2.0], [-1.0]])
    for decay, constant in ((0.0, True), (0.9, False)):
        method = method_of(adapter, "forward_kl", ratio_decay=decay)
        method.weights(torch.zeros(2, 1), t)
        weights = method.weights(logits, t).flatten()
        assert torch.allclose(weights, torch.ones(2)) == constant


def test_the_students_gradient_is_weighted_per_sample() -> None:
    """With the teacher's score difference the same for all, gradients are in the ratio of the weights."""
    adapter = spy((1, 1, 1, 1))
    gradients, weights = [], []
    for divergence in ("reverse_kl", "forward_kl"):
        method = method_of(adapter, divergence, gan_weight=0.0, score_time_range=(0.6, 0.6))
        x0 = (-0.3 + 0.9 * normal((16, 1, 1, 1, 1), seeded(8))).requires_grad_()
        original = method.weights

        def spied(logits: Tensor, t: Tensor, original: Any = original) -> Tensor:
            weights.append(original(logits, t))
            return weights[-1]

        method.weights = spied
        method.student_loss(x0, analytic_batch(adapter, 16)).value.backward()
        gradients.append(x0.grad)
    torch.testing.assert_close(gradients[1], weights[1] * gradients[0], rtol=1e-4, atol=1e-7)
    assert float(weights[1].std()) > 1e-3


def test_a_batch_of_one_is_refused(adapter: SpyAdapter) -> None:
    with pytest.raises(UserError, match="above 1"):
        next(method_of(adapter).losses(analytic_batch(adapter, 1), 0))


def test_forwards_are_those_of_dmd2_with_a_discriminator(adapter: SpyAdapter) -> None:
    method = method_of(adapter)
    list(method.losses(analytic_batch(adapter, 4), 0))
    assert (adapter.grad_modes(method.teacher), adapter.grad_modes(method.critic)) == ("gnn", "ng")


@pytest.mark.nightly
@pytest.mark.parametrize("divergence", ["jensen_shannon", "forward_kl"])
def test_a_two_parameter_student_reaches_the_truth_on_average(divergence: str) -> None:
    adapter = spy((1, 1, 1, 16))
    method = method_of(adapter, divergence, gan_weight=0.01)
    method.ladder = Ladder((1.0,))
    tail: list[tuple[float, float]] = []

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        adapter.feature_calls.clear()
        if step > 1200:
            tail.append(moments(method.student))
        return analytic_batch(adapter, 64, seed=step)

    train(method, batches, 1500, {"student": 0.01, "critic": 0.02, "discriminator": 0.01}, final_rate=0.1)
    mean, std = (sum(values) / len(tail) for values in zip(*tail, strict=True))
    assert (mean, std) == pytest.approx((MEAN, STD), abs=0.03)
