"""Derivative of the tiny teacher's velocity along its own flow: forward-mode autodiff beside central differences.

    python benchmarks/derivative_in_time.py

Objectives of continuous time (MeanFlow, sCM, rCM, AnyFlow) regress on it. A network was trained at drawn times and may
do anything between them. Differences over 0.02 and 0.1 hardly differ, so that is what the flow does; where autodiff
is far from them, its target is the network's own ripple. 20 seconds of one core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from fastvideo.distillation.jvp import derivative
from fastvideo.distillation.noise import add_noise
from fastvideo.inference.loading import load_model
from fastvideo.tiny.world import TinyWorld

VIDEOS, GUIDANCE, SMOOTH = 32, 2.0, 0.04
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SPANS = (0.005, 0.02, 0.04, 0.1)


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.square().mean().sqrt())


@torch.no_grad()
def main() -> None:
    """Print root mean squares by time."""
    torch.set_num_threads(1)
    model = load_model("tiny")
    family, network = model.adapter, model.denoiser
    world = TinyWorld("train").sample(VIDEOS, 11)
    x0 = family.codec.encode(world.videos).float()
    condition = family.conditioner.encode_prompts(list(world.captions))
    negative = family.conditioner.encode_prompts([family.conditioner.negative_prompt] * VIDEOS)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    print("time  velocity  autodiff  " + "  ".join(f"over {h:<5g}" for h in SPANS) + "  autodiff off by")
    for time in TIMES:
        t = torch.full((VIDEOS,), time)
        x = add_noise(x0, noise, t)
        flow = network.guided_velocity(x, t, condition, negative, GUIDANCE)

        def field(x_t: Tensor, at: Tensor) -> Tensor:
            return network.velocity(x_t, at, condition)

        exact = derivative("autodiff", SMOOTH)(field, x, t, flow, torch.ones_like(t))
        found = {h: derivative("central_difference", h)(field, x, t, flow, torch.ones_like(t)) for h in SPANS}
        off = rms(exact - found[SMOOTH]) / rms(found[SMOOTH])
        shown = "  ".join(f"{rms(found[h]):10.2f}" for h in SPANS)
        print(f"{time:4.2f}  {rms(flow):8.2f}  {rms(exact):8.2f}  {shown}  {off:8.2f}", flush=True)


if __name__ == "__main__":
    main()
