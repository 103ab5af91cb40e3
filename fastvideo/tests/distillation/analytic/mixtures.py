"""The mixture with three modes that one-step students must reproduce, and how far they are from it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import SiteMLP
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.types import Batch, RawBatch
from fastvideo.tests.preparing import preparer

MEANS, STDS, WEIGHTS = (-1.2, 0.1, 1.1), (0.15, 0.2, 0.1), (0.3, 0.4, 0.3)
"""Close to unit variance, as normalised latents are; the modes are several standard deviations apart."""


def three_modes(shape: tuple[int, int, int, int] = (1, 1, 4, 4)) -> AnalyticAdapter:
    """The family whose elements are drawn from the mixture."""
    adapter = AnalyticAdapter(AnalyticConfig(means=MEANS, stds=STDS, weights=WEIGHTS, shape=shape))
    adapter.ensure_negative_conditioning()
    return adapter


def exact_batch(adapter: AnalyticAdapter, count: int, seed: int, *, latents: bool = True) -> Batch:
    """A prepared batch of exact data of any analytic family, unconditional."""
    noise = torch.randn((count, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(seed))
    x0 = adapter.data_of(noise, adapter.conditioner.encode_prompts(("",) * count)) if latents else None
    return preparer(adapter)(RawBatch(("",) * count, x0))


def steep_mlp(channels: int, width: int = 64, gain: float = 1.0) -> SiteMLP:
    """A small network whose first units turn ``gain`` times as fast along ``x``.

    The map from noise to the mixture is steep between modes: what a network smears there is most of its distance. The
    map itself, regressed for 1000 steps of batch 1024, is missed by 0.033 with gain 1 and by 0.015 with gain 5.
    """
    network = SiteMLP(channels, width)
    first: Any = network.body[0]
    with torch.no_grad():
        first[0].weight[:, :channels] *= gain
        first[0].bias *= gain
    return network


def learned_velocity(adapter: AnalyticAdapter, steps: int = 1500, width: int = 64, gain: float = 1.0) -> SiteMLP:
    """A network that has learnt the family's velocity by regression: where students and critics start."""
    exact = adapter.folder.load_network("denoiser").requires_grad_(False)
    network = steep_mlp(adapter.codec.latent_shape[0], width, gain)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    pool, shift = exact_batch(adapter, 1000, 0).x0, torch.zeros(64)
    assert pool is not None
    for _ in range(steps):
        t, x0 = torch.rand(64, generator=generator), pool[torch.randint(1000, (64,), generator=generator)]
        x_t = torch.lerp(x0, torch.randn(x0.shape, generator=generator), t.view(-1, 1, 1, 1, 1))
        loss = (network(x_t, t, shift) - exact(x_t, t, shift)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def quantiles(count: int) -> Tensor:
    """``count`` equally likely values of the mixture, ascending, from its closed form."""
    adapter = three_modes((1, 1, 1, count))
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.special.ndtri(ranks).float().view(1, 1, 1, 1, -1)
    with torch.no_grad():
        return adapter.data_of(noise, adapter.conditioner.encode_prompts(("",))).flatten().double()


def wasserstein_1(samples: Tensor) -> float:
    """Wasserstein-1 distance of samples to the mixture: in one dimension, of sorted samples to its quantiles."""
    ordered = samples.detach().flatten().double().sort().values
    return float((ordered - quantiles(len(ordered))).abs().mean())


def mode_shares(samples: Tensor) -> list[float]:
    """Share of the samples within three standard deviations of each mode; of the mixture: its weights, nearly."""
    flat = samples.detach().flatten()
    return [float(((flat - m).abs() < 3 * s).float().mean()) for m, s in zip(MEANS, STDS, strict=True)]


def one_step(method: DistillMethod[Any], count: int = 50_000) -> Tensor:
    """``[count]`` samples of a one-step student by its method's sampler, from the quantiles of the noise.

    Noise that is spread evenly and not drawn: the distance of these samples has no error of sampling.
    """
    student, streams = method.bundle["student"], RandomStreams(7)
    adapter: Any = student.adapter
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.special.ndtri(ranks).float().view(-1, 1, 1, 1, 1)
    velocity = partial(student.velocity, condition=adapter.conditioner.negative(count))
    return generate(method.sampler, velocity, noise, (1.0,), streams.normal_like).flatten()
