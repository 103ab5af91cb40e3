"""The test bed itself: every exact network against an independent way to the same number, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import (
    FrameConsistency,
    FrameDenoiser,
    MixtureConsistency,
    MixtureDenoiser,
    SiteMLP,
    VectorMixtureDenoiser,
    mixture_flow_map,
)
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.analytic.mixtures import (
    MEANS,
    STDS,
    WEIGHTS,
    exact_batch,
    learned_velocity,
    mode_shares,
    quantiles,
    three_modes,
    wasserstein_1,
)

ZERO = torch.zeros(1, dtype=torch.float64)


def runge_kutta(network: nn.Module, x: Tensor, start: float, end: float, steps: int = 400) -> Tensor:
    """The flow from ``start`` to ``end`` by classical fourth order steps."""
    h = (end - start) / steps

    def u(x: Tensor, t: float) -> Tensor:
        return network(x, torch.full((len(x),), t, dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64))

    with torch.no_grad():
        for i in range(steps):
            t = start + i * h
            k1 = u(x, t)
            k2 = u(x + h / 2 * k1, t + h / 2)
            k3 = u(x + h / 2 * k2, t + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + u(x + h * k3, t + h))
    return x


def grid(count: int = 41) -> Tensor:
    """Points over five standard deviations of noise, ``[1, 1, 1, 1, count]`` float64."""
    return torch.linspace(-5, 5, count, dtype=torch.float64).view(1, 1, 1, 1, -1)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 0.4), (0.7, 0.2), (0.3, 0.9)])
def test_the_quantile_map_is_the_flow_of_the_exact_velocity(start: float, end: float) -> None:
    denoiser = MixtureDenoiser(MEANS, STDS, WEIGHTS).double()
    mixture = denoiser.mean, denoiser.std, denoiser.log_weight.exp()
    one, t, r = (torch.tensor([v], dtype=torch.float64) for v in (1.0, start, end))
    x_t = mixture_flow_map(grid(), one, t, *mixture).detach()
    jumped = mixture_flow_map(x_t, t, r, *mixture)
    torch.testing.assert_close(jumped, runge_kutta(denoiser, x_t, start, end), rtol=0, atol=1e-6)


def test_the_quantile_map_has_exact_derivatives() -> None:
    """Along the flow the end does not move: ``df/dt + u df/dx = 0``; and it is differentiable in its parameters."""
    denoiser, consistency = (cls(MEANS, STDS, WEIGHTS).double() for cls in (MixtureDenoiser, MixtureConsistency))
    x, t = grid(9).clone().requires_grad_(), torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    f = x - t * consistency(x, t, ZERO)
    for i in range(9):
        dx, dt, dmean = torch.autograd.grad(f[..., i].sum(), (x, t, consistency.mean), retain_graph=True)
        u = denoiser(x, t, ZERO)[..., i]
        assert float((dt + dx[..., i] * u).detach()) == pytest.approx(0.0, abs=1e-6)
        assert float(dmean.abs().sum()) > 0


@pytest.mark.parametrize("correlation", [0.9, -0.5])
def test_the_frames_flow_is_the_symmetric_root_of_their_covariance(correlation: float) -> None:
    network = FrameConsistency(0.0, 1.0, correlation).double()
    noise = torch.randn(5, 1, 2, 1, 1, dtype=torch.float64)
    t = torch.ones(5, dtype=torch.float64)
    end = noise - network(noise, t, t * 0)
    p, q = ((math.sqrt(1 + correlation) + s * math.sqrt(1 - correlation)) / 2 for s in (1, -1))
    root = torch.tensor([[p, q], [q, p]], dtype=torch.float64)
    torch.testing.assert_close(end[:, 0, :, 0, 0], noise[:, 0, :, 0, 0] @ root, rtol=0, atol=1e-6)
    if correlation == 0.9:
        assert (p, q) == pytest.approx((0.8473, 0.5311), abs=1e-4)


def test_the_frames_flow_is_the_flow_of_their_exact_velocity() -> None:
    denoiser, consistency = (cls(0.7, 0.4, 0.8).double() for cls in (FrameDenoiser, FrameConsistency))
    noise = torch.randn(4, 2, 3, 2, 1, dtype=torch.float64)
    t = torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        jumped = noise - consistency(noise, t, t * 0)
    torch.testing.assert_close(jumped, runge_kutta(denoiser, noise, 1.0, 0.0, 200), rtol=0, atol=2e-6)


def test_the_frames_velocity_is_a_regression_at_times_that_differ() -> None:
    """Against least squares on 200,000 draws; frame 0 is nearly clean, frame 1 noisy."""
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(FrameDenoiser(0.0, 1.0, 0.9).correlations(range(2)).double())
    x0 = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) @ root.T
    noise = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    x_t = (1 - t) * x0 + t * noise
    fitted = torch.linalg.lstsq(x_t, noise - x0).solution
    network = FrameDenoiser(0.0, 1.0, 0.9).double()
    unit = torch.eye(2, dtype=torch.float64).view(2, 1, 2, 1, 1)
    gain = network(unit, t.expand(2, 2), torch.zeros(2, dtype=torch.float64)).detach()[:, 0, :, 0, 0]
    torch.testing.assert_close(gain, fitted, rtol=0, atol=0.02)


def test_without_correlation_frames_are_the_plain_gaussian() -> None:
    x, t = torch.randn(3, 1, 2, 2, 2), torch.tensor([0.2, 0.5, 0.9])
    shift = torch.tensor([0.0, 1.0, -2.0])
    plain = MixtureDenoiser((0.7,), (0.4,), (1.0,))(x, t, shift)
    torch.testing.assert_close(FrameDenoiser(0.7, 0.4, 0.0)(x, t, shift), plain, rtol=1e-4, atol=1e-5)


def test_a_mixture_over_channels_chooses_one_component_for_all_of_them() -> None:
    """Two far components at (-3, 3) and (3, -3): the sign of one channel says what the other will be."""
    network = VectorMixtureDenoiser([[-3.0, 3.0], [3.0, -3.0]], [0.1, 0.1], [1.0, 1.0]).double()
    x = torch.tensor([2.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    t = torch.tensor([0.5], dtype=torch.float64)
    x0 = (x - 0.5 * network(x, t, ZERO)).detach().flatten()
    assert x0.tolist() == pytest.approx([3.0, -3.0], abs=0.1)
    assert x0[1] < -2.8, "its own value of 0 says nothing"


def test_a_mixture_over_one_channel_is_the_plain_mixture() -> None:
    x, t = torch.randn(3, 1, 2, 2, 2), torch.tensor([0.2, 0.5, 0.9])
    shift = torch.tensor([0.0, 1.0, -2.0])
    vector = VectorMixtureDenoiser([[m] for m in MEANS], STDS, WEIGHTS)
    torch.testing.assert_close(vector(x, t, shift), MixtureDenoiser(MEANS, STDS, WEIGHTS)(x, t, shift))


def test_exact_data_has_the_mixtures_moments_and_modes() -> None:
    x0 = exact_batch(three_modes(), 1000, seed=1).x0
    assert x0 is not None
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    second = sum(w * (m**2 + s**2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    assert (float(x0.mean()), float(x0.square().mean())) == pytest.approx((mean, second), abs=0.02)
    assert mode_shares(x0) == pytest.approx(WEIGHTS, abs=0.02)
    assert wasserstein_1(x0) < 0.02
    assert wasserstein_1(x0 + 0.1) == pytest.approx(0.1, abs=0.02)


def test_quantiles_are_those_of_the_cumulative_distribution() -> None:
    found = quantiles(1000)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    z = (found[:, None] - torch.tensor(MEANS)) / torch.tensor(STDS)
    cdf = (weights * torch.special.ndtr(z.double())).sum(-1)
    torch.testing.assert_close(cdf, (torch.arange(1000).double() + 0.5) / 1000, rtol=0, atol=1e-5)


def test_a_learned_network_comes_close_to_the_exact_velocity_and_reads_r_only_later() -> None:
    adapter = three_modes((1, 1, 1, 1))
    network = learned_velocity(three_modes(), steps=300)
    exact = adapter.folder.load_network("denoiser")
    x, t, shift = torch.linspace(-1.5, 1.5, 64).view(-1, 1, 1, 1, 1), torch.full((64,), 0.6), torch.zeros(64)
    with torch.no_grad():
        assert float((network(x, t, shift) - exact(x, t, shift)).square().mean().sqrt()) < 0.2
        assert torch.equal(network(x, t, shift), network(x, t, shift, r=t * 0.3))
        network.span.weight.fill_(0.1)
        assert not torch.equal(network(x, t, shift), network(x, t, shift, r=t * 0.3))
    adapter.folder.add_flow_map(network)


def test_every_kind_of_network_comes_back_from_its_folder(tmp_path) -> None:
    for options in (
        {},
        {"means": MEANS, "stds": STDS, "weights": WEIGHTS},
        {"correlation": 0.5, "shape": (1, 2, 2, 2)},
    ):
        adapter = AnalyticAdapter(AnalyticConfig(**options))
        for kind in ("denoiser", "consistency", "mlp"):
            network = adapter.folder.load_network(kind)
            folder = tmp_path / f"{kind}-{len(options)}"
            adapter.folder.save(folder, network, {})
            again = adapter.folder.load_network(str(folder))
            assert type(again) is type(network)
            assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_what_a_distribution_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="unknown; one of denoiser"):
        AnalyticAdapter(AnalyticConfig()).folder.load_network("denoisr")
    with pytest.raises(UserError, match="needs one component"):
        three_modes().folder.load_network("mean_velocity")
    with pytest.raises(ValueError, match="correlated frames have one component"):
        AnalyticConfig(means=MEANS, stds=STDS, weights=WEIGHTS, correlation=0.5)
    with pytest.raises(UserError, match="'mean_velocity' and 'mlp'"):
        three_modes().folder.add_flow_map(three_modes().folder.load_network("denoiser"))
    assert isinstance(three_modes().folder.load_network("mlp"), SiteMLP)
