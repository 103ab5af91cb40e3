"""How well models of the tiny world go on from a given first frame.

python benchmarks/first_frame.py outputs/tiny_wan_i2v_dmd2/student

Held-out videos give first frame and caption. Measured: how much of the first frame is kept (the VAE alone sets the
limit), how smoothly the second follows (real videos beside it), and whether digit, colour and motion are the caption's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor

from fastvideo.evaluation.evaluate import sample_videos, warm_up
from fastvideo.evaluation.judge import Judge
from fastvideo.inference.loading import LoadedModel, load_model

COLUMNS = (
    "model", "steps", "guidance", "first frame, dB", "VAE alone, dB", "second to first, dB", "digit", "colour",
    "direction",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Compare models on the first frames and captions of held-out videos."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Model folders."""
    prompts: int = 256
    """Videos per model."""
    steps: int | None = None
    """Sampling steps, instead of each model's own."""
    seed: int = 0
    """Chooses videos and noise."""


def psnr(one: Tensor, other: Tensor) -> float:
    """Mean over videos, in dB, of frames ``[N, 3, H, W]`` in ``[-1, 1]``."""
    return float((10 * torch.log10(4 / (one - other).square().mean((1, 2, 3)).clamp_min(1e-8))).mean())


def measured(model: LoadedModel, judge: Judge, real: Tensor, steps: int | None) -> str:
    """One row of the table."""
    warm_up(model, judge.prompts[:2])
    spec, frames = model.sampler(steps), judge.first_frames(model.adapter.conditioner)
    made = sample_videos(
        model, spec, judge, judge.prompts, judge.seed, 64, len(real), lambda units: None, frames=frames
    )
    videos, found = made.videos, judge.accuracies(made.seen)
    limit = torch.cat(
        [model.adapter.codec.decode(model.adapter.codec.encode(part[:, :, :1])) for part in real.split(64)]
    )[:, :, 0]
    kept = f"{psnr(videos[:, :, 0], real[:, :, 0]):.1f} | {psnr(limit, real[:, :, 0]):.1f}"
    step = f"{psnr(videos[:, :, 1], videos[:, :, 0]):.1f}"
    scores = " | ".join(f"{found[f'{name}_accuracy'].value:.3f}" for name in ("digit", "colour", "direction"))
    return f"| {model.source} | {len(spec.times)} | {spec.guidance:g} | {kept} | {step} | {scores} |"


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments)
    judge = Judge(arguments.prompts, arguments.seed)
    real = judge.real_videos()
    print(f"{arguments.prompts} held-out videos; second frame against first in real ones: ", end="")
    print(f"{psnr(real[:, :, 1], real[:, :, 0]):.1f} dB")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for folder in arguments.models:
        print(measured(load_model(folder), judge, real, arguments.steps))


if __name__ == "__main__":
    main()
