"""The tiny world's truth as metrics: for models of that world, whose prompts name what their videos must show."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.evaluation.judge import DIVERSITY_SEEDS, Judge, Observed
from fastvideo.evaluation.metric import Batch, Figures, Metric, Seen
from fastvideo.evaluation.metrics import diversity


class WorldTruth(Metric):
    """Accuracies of the named attributes, and distances from real videos; ``floors`` are those of a perfect model."""

    def __init__(self, judge: Judge, floors: tuple[float, float]) -> None:
        self.judge, self.floors = judge, floors

    def observe(self, batch: Batch) -> Seen:
        return vars(self.judge.observe(batch.videos))

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        observed = Observed(**seen)
        features, pixels = self.judge.distances(observed)
        return {
            **self.judge.accuracies(observed),
            "frechet": features,
            "frechet_pixel": pixels,
            "frechet_floor": self.floors[0],
            "frechet_pixel_floor": self.floors[1],
        }


class WorldDiversity(Metric):
    """Spread of the videos of one prompt relative to that of fitting real videos."""

    of_seeds = True

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def observe(self, batch: Batch) -> Seen:
        return {"features": self.judge.observe(batch.videos).features}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        by_prompt = torch.unflatten(seen["features"], 0, (-1, DIVERSITY_SEEDS))
        return {"diversity": diversity(by_prompt, self.judge.diversity_task.real, counts)}
