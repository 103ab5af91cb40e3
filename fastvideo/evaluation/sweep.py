"""Search for a guidance scale, on prompts and videos that no reported figure uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastvideo.evaluation.evaluate import sample_videos, warm_up
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.measuring import check_judged
from fastvideo.evaluation.rows import RowSpec
from fastvideo.evaluation.statistics import Estimate
from fastvideo.inference.loading import load_model
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import BATCH_SIZE


def sweep_guidance(
    spec: RowSpec,
    scales: Sequence[float],
    *,
    prompts: int = 512,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
) -> dict[float, Estimate]:
    """Frechet distance at each guidance scale, on training prompts against training videos.

    Raises:
        UserError: for a model of another world, before anything is sampled.
    """
    model = load_model(spec.folder, device=device)
    check_judged(spec.folder, model)
    judge = Judge(prompts, seed, split="train")
    warm_up(model, judge.prompts)
    frames = judge.first_frames(model.adapter.conditioner)
    latent_frames = model.adapter.codec.latent_shape[1]
    found: dict[float, Estimate] = {}
    for scale in scales:
        sampler = replace(spec, guidance=scale).sampler(model)
        with PatientBar(f"guidance {scale:g}", len(judge.prompts) * (sampler.calls_of(latent_frames) + 2)) as bar:
            sampled = sample_videos(model, sampler, judge, judge.prompts, seed, batch_size, 0, bar, frames=frames)
        found[scale] = judge.distances(sampled.seen)[0]
    return found
