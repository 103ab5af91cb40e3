"""The streaming tiny world as a judge: prompts with known attributes, real streams of them, and real windows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.frechet import Moments
from fastvideo.evaluation.metrics import ATTRIBUTES, named_attributes
from fastvideo.evaluation.statistics import resample_counts
from fastvideo.evaluation.streams.drift import Comparison, drift_figures, drift_series
from fastvideo.evaluation.streams.motion import window_starts
from fastvideo.evaluation.streams.observer import SeenStreams, observe_streams
from fastvideo.inference.progress import PatientBar
from fastvideo.tiny.classifier import FRAMES
from fastvideo.tiny.world import Split, torus

STRIDE = 16
"""Frames between the windows of a drift curve."""
REFERENCE_WINDOWS, REFERENCE_SEED = 2048, 900_003
BATCH = 256
SHORTEST = STRIDE + FRAMES
"""Frames of a stream with two windows."""


@lru_cache(maxsize=4)
def real_windows(split: Split, count: int) -> Moments:
    """Moments of the judge's features of ``count`` real windows; every window of a real stream is as likely."""
    parts = []
    with PatientBar("real windows", count) as bar:
        for sample in torus(split, FRAMES).batches(count, REFERENCE_SEED, BATCH):
            parts.append(observe_streams(sample.videos, (0,)).features[:, 0])
            bar(len(sample.videos))
    return Moments.of(torch.cat(parts))


class StreamJudge:
    """Scores streams of the first ``prompts`` captions that ``seed`` draws from the held-out streaming world.

    Args:
        prompts: how many; at least 2.
        frames: of each stream.
        reference: real windows behind the reference moments; fewer are faster.

    Raises:
        UserError: for fewer than two prompts, or streams too short to have a course.
    """

    def __init__(self, prompts: int, seed: int, frames: int, reference: int = REFERENCE_WINDOWS) -> None:
        if prompts < 2:
            raise UserError(f"evaluation needs at least 2 prompts, got {prompts}")
        if frames < SHORTEST:
            raise UserError(f"a stream of {frames} frames is too short to drift: at least {SHORTEST} are expected")
        self.world, self.seed, self.frames, self.reference_windows = torus("heldout", frames), seed, frames, reference
        self.prompts = tuple(self.world.sample_captions(prompts, seed))
        self.named = named_attributes(self.prompts)
        self.counts = resample_counts(prompts, seed)
        self.starts = window_starts(frames, STRIDE)

    @property
    def reference(self) -> Moments:
        return real_windows(self.world.split, self.reference_windows)

    def first_frames(self, conditioner: Conditioner) -> None:
        """Conditioning frames: none.

        Raises:
            UserError: for a model that goes on from some.
        """
        if of_frames(conditioner).needs_frames:
            raise UserError("streams have text alone in their condition, and this model has given frames there")

    def real_batches(self, batch_size: int) -> Iterator[Tensor]:
        """The real streams ``[B, 3, T, 32, 32]`` of the prompts."""
        return (sample.videos for sample in self.world.batches(len(self.prompts), self.seed, batch_size))

    def against(self, real: SeenStreams | None, counts: Tensor | None = None) -> Comparison:
        """The comparison of these prompts with real streams."""
        return Comparison(self.named, self.counts if counts is None else counts, self.reference, real)

    def score(self, videos: Tensor) -> dict[str, float]:
        """Figures without intervals of one stream per prompt, for validation while training."""
        seen = observe_streams(videos, self.starts)
        once = torch.ones(1, len(self.prompts), dtype=torch.float64)
        series = drift_series(seen, self.against(None, once))
        found = drift_figures(seen, series, once)
        kept = [f"{name}_last" for name in (*ATTRIBUTES, "frechet", "speed", "frozen")]
        figures = {name: found[name].value for name in (*kept, "ink_slope", "saturation_slope")}
        return {**{f"{name}_first": series[name][0].value for name in (*ATTRIBUTES, "frechet")}, **figures}
