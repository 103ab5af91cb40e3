"""Metrics of any model's videos relative to its teacher's; each figure has a 95 % interval.

Model and teacher share prompts and noise, so that one set of bootstrap resamples serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo.evaluation.feature_distance import FeatureSpaces, halves_distance, split
from fastvideo.evaluation.instrument import Instrument, distractors
from fastvideo.evaluation.looks import LOOKS, looks
from fastvideo.evaluation.metric import Batch, Figures, Metric, Seen
from fastvideo.evaluation.metrics import spread
from fastvideo.evaluation.statistics import Estimate, estimate, weighted_mean


class TeacherDistance(Metric):
    """``fd_teacher`` and ``fd_data``: Frechet distances in the feature space of the frozen teacher."""

    def __init__(self, instrument: Instrument, data: Tensor | None = None) -> None:
        self.instrument, self.data = instrument, data

    def observe(self, batch: Batch) -> Seen:
        return {"features": self.instrument.features(batch.latents, batch.seeds)}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        own, reference = seen["features"], teacher["features"]
        spaces = FeatureSpaces.fit(reference)
        value, resampled = halves_distance(spaces, reference, own, counts)
        floor, _ = halves_distance(spaces, reference, reference, counts[:1])
        found: Figures = {"fd_teacher": estimate(value, resampled, len(own)), "fd_teacher_floor": floor}
        return found | (self._to_data(spaces, own, counts) if self.data is not None else {})

    def _to_data(self, spaces: FeatureSpaces, own: Tensor, counts: Tensor) -> Figures:
        """Distance to the user's data, with all of either; its floor from two halves of the data."""
        assert self.data is not None
        once = torch.ones(1, len(self.data), dtype=torch.float64)
        value, resampled = spaces.distance(self.data, own, once, counts)
        first, second = split(len(self.data))
        floor = spaces.distance(self.data[first], self.data[second], once[:, first], once[:, second])[0]
        return {"fd_data": estimate(value, resampled, len(own)), "fd_data_floor": floor}


class PromptMatch(Metric):
    """``prompt_match``: share of videos that the teacher denoises best under their own prompt, of several."""

    def __init__(self, instrument: Instrument, prompts: Sequence[str]) -> None:
        self.instrument = instrument
        self.others = dict(zip(prompts, distractors(prompts), strict=True))

    @property
    def chance(self) -> float:
        """Share that a blind guess finds."""
        return 1 / (1 + len(next(iter(self.others.values()))))

    def observe(self, batch: Batch) -> Seen:
        own = self.instrument.errors(batch.latents, batch.prompts, batch.seeds)
        rivals = zip(*(self.others[prompt] for prompt in batch.prompts), strict=True)
        errors = [self.instrument.errors(batch.latents, prompts, batch.seeds) for prompts in rivals]
        return {"found": (own[:, None] < torch.stack(errors, 1)).all(1).double()}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        value, resampled = weighted_mean(seen["found"], counts)
        found = estimate(value, resampled, len(seen["found"]), highest=1.0)
        return {"prompt_match": found, "prompt_match_chance": self.chance}


class Looks(Metric):
    """Motion, sharpness, saturation and flicker as ratios to the teacher's; ``motion_distance`` of distributions.

    Args:
        names: those of :data:`LOOKS` that are wanted.
    """

    def __init__(self, names: Sequence[str] = LOOKS) -> None:
        self.names = names

    def observe(self, batch: Batch) -> Seen:
        return looks(batch.videos)

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        found: Figures = {name: ratio(seen[name], teacher[name], counts) for name in self.names}
        if "motion" in self.names:
            found["motion_distance"] = transport(seen["motion"], teacher["motion"], counts)
        return found


class SeedDiversity(Metric):
    """``seed_diversity``: spread of the videos of one prompt in the teacher's features, as a ratio to the teacher's."""

    of_seeds = True

    def __init__(self, instrument: Instrument, seeds: int) -> None:
        self.instrument, self.seeds = instrument, seeds

    def observe(self, batch: Batch) -> Seen:
        return {"features": self.instrument.features(batch.latents, batch.seeds).flatten(1)}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        scale = teacher["features"].std(0).clamp_min(1e-6)
        ours, theirs = (spread((one["features"] / scale).unflatten(0, (-1, self.seeds))) for one in (seen, teacher))
        return {"seed_diversity": ratio(ours, theirs, counts)}


def ratio(ours: Tensor, theirs: Tensor, counts: Tensor) -> Estimate:
    """Mean of ``ours`` ``[N]`` over that of ``theirs``, with resamples of both together; NaN if theirs is 0."""
    (value, resampled), (base, base_resampled) = weighted_mean(ours, counts), weighted_mean(theirs, counts)
    if not base > 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    return estimate(value / base, resampled / base_resampled, len(ours))


def transport(ours: Tensor, theirs: Tensor, counts: Tensor) -> Estimate:
    """Mean distance between the sorted values of two samples ``[N]`` (1-Wasserstein), over the mean of ``theirs``."""
    base = float(theirs.double().mean())
    if not base > 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (first.double().sort(-1).values - second.double().sort(-1).values).abs().mean(-1) / base

    drawn = torch.stack([torch.repeat_interleave(torch.arange(len(ours)), row.long()) for row in counts])
    return estimate(float(distance(ours, theirs)), distance(ours[drawn], theirs[drawn]), len(ours))
