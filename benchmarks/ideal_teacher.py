"""How hard the tiny world is for few steps, whatever the network: the exact denoiser of its training latents, sampled.

python benchmarks/ideal_teacher.py

The velocity of the empirical distribution of N latents is known in closed form (a softmax over all of them), so Euler
steps on it show what a perfect unconditional teacher would lose at few steps. Fifty steps return training videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.noise import x0_to_velocity
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.samplers import euler
from fastvideo.evaluation.judge import Judge
from fastvideo.tiny.latents import cached_latents
from fastvideo.tiny.world import TinyWorld


@dataclass(frozen=True)
class Arguments:
    """Sample the exact denoiser of the tiny world's training latents with few and many steps."""

    latents: int = 12000
    """Training videos behind the denoiser."""
    samples: int = 512
    """Videos per row."""
    steps: tuple[int, ...] = (50, 8, 4, 2, 1)
    """Euler steps."""
    cache: Path = Path("outputs/cache")
    """Where the latents are kept."""


def ideal_velocity(data: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Velocity of the empirical distribution of ``data`` ``[N, D]`` at ``x`` ``[B, D]``, ``t`` ``[B]``.

    ``E[x0 | x_t]`` weighs every latent by ``exp(-|x_t - (1 - t) x0|^2 / (2 t^2))``.
    """
    alpha, sigma = 1 - t[:, None], t[:, None]
    logits = (alpha * (x @ data.T) - 0.5 * alpha**2 * data.square().sum(1)) / sigma**2
    return x0_to_velocity(x, logits.softmax(1) @ data, t)


def main() -> None:
    """Print one line per number of steps."""
    arguments = tyro.cli(Arguments)
    torch.set_flush_denormal(True)
    adapter, judge = WanFamily(WanFamilyConfig()), Judge(arguments.samples, seed=0)
    latents = cached_latents(adapter.codec, TinyWorld("train"), arguments.latents, 0, arguments.cache).latents
    data, shape = latents.flatten(1), latents.shape[1:]
    noise = normal((arguments.samples, data.shape[1]), seeded(0))
    print("steps  Frechet  pixel Frechet")
    for steps in arguments.steps:
        sampled = euler(lambda x, t: ideal_velocity(data, x, t), noise, adapter.folder.teacher_times(steps))
        videos = torch.cat([adapter.codec.decode(part) for part in sampled.view(-1, *shape).split(64)])
        distance, pixels = judge.distances(judge.observe(videos.clamp(-1, 1)))
        print(f"{steps:5d}  {distance.value:7.1f}  {pixels.value:7.0f}", flush=True)


if __name__ == "__main__":
    main()
