"""Derivatives along a direction: against closed form in float64, against each other, and where they cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic_networks import GaussianMeanVelocity
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.jvp import AutodiffDerivative, CentralDifference, derivative
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import FAMILIES

MEAN, STD = 0.7, 0.4
NETWORK = GaussianMeanVelocity(MEAN, STD).double()
SHIFT = torch.zeros(3, dtype=torch.float64)
T = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
X = torch.linspace(-1.5, 2.0, 12, dtype=torch.float64).view(3, 1, 1, 2, 2)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return NETWORK(x, t, SHIFT)  # type: ignore[no-any-return]


def along_the_flow(t: Tensor = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x, t`` and the direction of the flow itself."""
    return X, t, velocity(X, t).detach(), torch.ones_like(t)


def acceleration(t: Tensor = T) -> Tensor:
    """``du / dt`` along the flow of N(mu, s^2): ``x = a mu + sqrt(v) z`` has ``d2x / dt2 = (sqrt v)'' z``."""
    t = t.view(-1, 1, 1, 1, 1)
    variance, slope, curve = (1 - t) ** 2 * STD**2 + t**2, 2 * t - 2 * (1 - t) * STD**2, 2 + 2 * STD**2
    second = curve / (2 * variance.sqrt()) - slope**2 / (4 * variance**1.5)
    return second * (X - (1 - t) * MEAN) / variance.sqrt()


def test_autodiff_is_the_closed_form_in_float64() -> None:
    found = AutodiffDerivative()(velocity, *along_the_flow())
    torch.testing.assert_close(found, acceleration(), rtol=0, atol=1e-6)  # MEAN and STD are float32 in the network
    assert not found.requires_grad


def test_a_central_difference_errs_by_its_step_squared() -> None:
    exact = AutodiffDerivative()(velocity, *along_the_flow())
    errors = [float((CentralDifference(h)(velocity, *along_the_flow()) - exact).abs().max()) for h in (2e-2, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    assert errors[1] < 1e-2


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_next_to_an_end_of_time_the_step_is_shorter_on_that_side_and_divided_by_its_true_length(edge: float) -> None:
    asked: list[Tensor] = []

    def line(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return 3.0 * x + 2.0 * t.view(-1, 1, 1, 1, 1)

    t = torch.tensor([edge, abs(edge - 1e-3), 0.5], dtype=torch.float64)
    dx, dt = torch.full_like(X, 0.7), torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    found = CentralDifference(5e-3)(line, X, t, dx, dt)
    torch.testing.assert_close(found, 3.0 * dx + 2.0 * dt.view(-1, 1, 1, 1, 1))
    assert all(0 <= float(times.min()) <= float(times.max()) <= 1 for times in asked)
    assert [float((a - b)[2]) for a, b in [asked]] == pytest.approx([5e-3])


def test_a_sample_at_rest_in_time_is_differenced_over_the_whole_step() -> None:
    found = CentralDifference(1e-3)(lambda x, t: x * 4.0, X, torch.zeros(3), torch.ones_like(X), torch.zeros(3))
    torch.testing.assert_close(found, torch.full_like(X, 4.0))


def family(name: str, root: Path, **options: Any) -> tuple[DistillAdapter[Any], nn.Module]:
    adapter = FAMILIES[name].make(root)
    if options:
        adapter = type(adapter)(adapter.config.model_copy(update=options))
    return adapter, adapter.folder.load_network()


def field_of(adapter: DistillAdapter[Any], network: nn.Module, prompts: tuple[str, str]) -> Callable[..., Tensor]:
    condition = adapter.conditioner.encode_prompts(prompts)
    return lambda x, t: adapter.velocity(network, x, t, condition)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_both_ways_agree_on_real_networks(name: str, tiny_wan: Path) -> None:
    adapter, network = family(name, tiny_wan.parent)
    field = field_of(adapter, network, FAMILIES[name].prompts)
    x, t = torch.randn(2, *adapter.codec.latent_shape), torch.tensor([0.3004, 0.8004])  # off CogVideoX's 1000 timesteps
    for dx, dt in ((torch.randn_like(x), torch.zeros(2)), (torch.randn_like(x), torch.ones(2))):
        exact = AutodiffDerivative()(field, x, t, dx, dt)
        found = CentralDifference(2e-4)(field, x, t, dx, dt)
        assert float((found - exact).norm() / exact.norm()) < 0.03
    assert network.training is False
    assert all(p.grad is None for p in network.parameters())


def test_a_derivative_is_taken_in_float32_whatever_the_forward_runs_in(tiny_wan: Path) -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        adapter, network = family("wan", tiny_wan.parent, precision=precision)
        field = field_of(adapter, network, FAMILIES["wan"].prompts)
        torch.manual_seed(1)
        x, dx = torch.randn(2, *adapter.codec.latent_shape), torch.randn(2, *adapter.codec.latent_shape)
        t = torch.tensor([0.3, 0.8])
        found.append(AutodiffDerivative()(field, x, t, dx, torch.ones(2)))
    assert torch.equal(*found)


def test_an_operation_without_forward_derivative_is_named_with_the_way_out(tiny_wan: Path) -> None:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    def flash(x: Tensor, t: Tensor) -> Tensor:
        q = x[:, :, 0].float()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    with pytest.raises(UserError, match=r"flash_attention.*central_difference"):
        AutodiffDerivative()(flash, X, T, X, T)
    with pytest.raises(UserError, match=r"autodiff.*\n?.*central_difference"):
        AutodiffDerivative()(lambda x, t: Rounded.apply(x), X, T, X, T)


def test_a_mistake_in_the_network_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="size"):
        AutodiffDerivative()(lambda x, t: x + torch.ones(7), X, T, X, T)


def test_the_config_names_the_way() -> None:
    assert isinstance(derivative("autodiff", 1e-3), AutodiffDerivative)
    chosen = derivative("central_difference", 5e-3, (0.0, 1.5))
    assert isinstance(chosen, CentralDifference)
    assert (chosen.step, chosen.bounds) == (5e-3, (0.0, 1.5))
