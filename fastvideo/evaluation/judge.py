"""The tiny world as a judge: prompts with known attributes, real reference videos, two feature spaces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.frechet import Moments, PixelPCA, frechet
from fastvideo.evaluation.measuring import TEACHER_JUDGES
from fastvideo.evaluation.metrics import accuracies, diversity, frechet_estimate, named_attributes, spread
from fastvideo.evaluation.statistics import Estimate, resample_counts
from fastvideo.inference.progress import PatientBar
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER
from fastvideo.tiny.world import FRAMES, SIZE, Split, TinyWorld

REFERENCE_VIDEOS = 2048
"""Real held-out videos behind the reference moments, the same for any number of prompts."""
COMPONENTS = 48
PCA_VIDEOS = 1024
REFERENCE_SEED, PCA_SEED = 900_001, 900_002
"""Streams of the world apart from those of the prompts."""
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 32, 4
FITTING_VIDEOS = 8
"""Fewest real videos of a prompt for a reference spread."""
BATCH = 256


@dataclass(frozen=True)
class Observed:
    """Observations of ``N`` videos: features ``[N, 64]``, pixel coordinates ``[N, K]``, labels ``[N, 3]``."""

    features: Tensor
    pixels: Tensor
    read: Tensor

    @classmethod
    def join(cls, parts: Iterable[Observed]) -> Observed:
        """All videos of several batches, in order."""
        parts = list(parts)
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.pixels for part in parts]),
            torch.cat([part.read for part in parts]),
        )


@dataclass(frozen=True)
class Diversity:
    """Prompts that leave an attribute open: positions ``[P]``, and the spread ``[P]`` of fitting real videos."""

    positions: Tensor
    real: Tensor


@lru_cache(maxsize=1)
def frozen_classifier() -> TinyClassifier:
    """The network of every judge."""
    return TinyClassifier.load(CLASSIFIER_FOLDER)


@lru_cache(maxsize=1)
def _components() -> PixelPCA:
    """The pixel components of every judge."""
    return PixelPCA.fit(TinyWorld("train").sample(PCA_VIDEOS, PCA_SEED).videos, COMPONENTS)


@torch.no_grad()
def observe(videos: Tensor) -> Observed:
    """Features, pixel coordinates and labels of videos ``[N, 3, 9, 32, 32]`` in ``[-1, 1]``."""
    classifier = frozen_classifier()
    features = classifier.features(videos)
    return Observed(
        features, _components()(videos), torch.stack([scores.argmax(1) for scores in classifier.heads(features)], 1)
    )


@lru_cache(maxsize=4)
def observe_real(split: Split, count: int) -> tuple[Observed, Tensor]:
    """``count`` observed real videos and their attributes ``[count, 3]``."""
    seen, truth = [], []
    with PatientBar("real videos", count) as bar:
        for sample in TinyWorld(split).batches(count, REFERENCE_SEED, BATCH):
            seen.append(observe(sample.videos))
            truth.append(torch.stack([sample.digit, sample.colour, sample.direction], 1))
            bar(len(sample.videos))
    return Observed.join(seen), torch.cat(truth)


class Judge:
    """Scores videos of the first ``prompts`` captions that ``seed`` draws from ``split``.

    Reference moments come from :data:`REFERENCE_VIDEOS` other real videos of the same split, the pixel components from
    videos of the training split. Both are the same for every seed.

    Args:
        prompts: how many; at least 2.
        split: ``heldout`` for figures; ``train`` for earlier choices such as a guidance scale.
        reference: real videos behind the reference moments; fewer are faster.

    Raises:
        UserError: for fewer than two prompts.
    """

    def __init__(self, prompts: int, seed: int, split: Split = "heldout", reference: int = REFERENCE_VIDEOS) -> None:
        if prompts < 2:
            raise UserError(f"evaluation needs at least 2 prompts, got {prompts}")
        self.world, self.seed, self.reference_videos = TinyWorld(split), seed, reference
        self.prompts = tuple(self.world.sample_captions(prompts, seed))
        self.named = named_attributes(self.prompts)
        self.counts = resample_counts(prompts, seed)

    def observe(self, videos: Tensor) -> Observed:
        """Observe videos ``[N, 3, 9, 32, 32]`` in ``[-1, 1]``.

        Raises:
            UserError: for videos of another shape.
        """
        if tuple(videos.shape[1:]) != (3, FRAMES, SIZE, SIZE):
            raise UserError(
                f"evaluation compares with the tiny world's videos, [3, {FRAMES}, {SIZE}, {SIZE}]; "
                f"this model makes {list(videos.shape[1:])}: {TEACHER_JUDGES}"
            )
        return observe(videos)

    @property
    def _reference(self) -> tuple[Observed, Tensor]:
        return observe_real(self.world.split, self.reference_videos)

    @cached_property
    def reference(self) -> tuple[Moments, Moments]:
        """Moments of real held-out videos: in the classifier's space and in pixel coordinates."""
        return Moments.of(self._reference[0].features), Moments.of(self._reference[0].pixels)

    def first_frames(self, conditioner: Conditioner) -> Tensor | None:
        """Conditioning frames ``[N, 3, T, 32, 32]`` out of :meth:`real_videos`; ``None`` for a model of text alone."""
        given = of_frames(conditioner)
        return self.real_videos()[:, :, : max(given.first_frames)] if given.needs_frames else None

    def real_videos(self) -> Tensor:
        """The real videos ``[N, 3, 9, 32, 32]`` whose captions are the prompts."""
        return self.world.sample(len(self.prompts), self.seed).videos

    def distances(self, seen: Observed) -> tuple[Estimate, Estimate]:
        """Frechet distances from the reference, in the classifier's space and in pixel coordinates."""
        features, pixels = self.reference
        return (
            frechet_estimate(features, seen.features, self.counts),
            frechet_estimate(pixels, seen.pixels, self.counts),
        )

    def accuracies(self, seen: Observed) -> dict[str, Estimate]:
        """``digit_accuracy``, ``colour_accuracy`` and ``direction_accuracy`` of one video per prompt."""
        return accuracies(seen.read, self.named, self.counts)

    @cached_property
    def diversity_task(self) -> Diversity:
        """The first prompts that leave an attribute open and have enough fitting real videos."""
        seen, truth = self._reference
        positions: list[int] = []
        real: list[Tensor] = []
        for position in (self.named < 0).any(1).nonzero().flatten().tolist():
            wanted = self.named[position]
            fitting = seen.features[((wanted < 0) | (wanted == truth)).all(1)][: 4 * FITTING_VIDEOS]
            if len(fitting) >= FITTING_VIDEOS and len(positions) < DIVERSITY_PROMPTS:
                positions.append(position)
                real.append(spread(fitting[None])[0])
        if not positions:
            raise UserError(f"none of {len(self.prompts)} prompts leaves an attribute open: evaluate more")
        return Diversity(torch.tensor(positions), torch.stack(real))

    def diversity(self, first: Observed, others: Observed) -> Estimate:
        """Spread over seeds relative to real videos, see :class:`~fastvideo.evaluation.metrics.Row`.

        Args:
            first: one video per prompt.
            others: ``DIVERSITY_SEEDS - 1`` more for each prompt of :attr:`diversity_task`, prompt by prompt.
        """
        task = self.diversity_task
        count = len(task.positions)
        features = torch.cat([first.features[task.positions, None], others.features.view(count, -1, 64)], 1)
        return diversity(features, task.real, resample_counts(count, self.seed))

    def score(self, videos: Tensor) -> dict[str, float]:
        """Figures without intervals for one video per prompt, for validation while training."""
        seen = self.observe(videos)
        features, pixels = self.reference
        figures = {name: found.value for name, found in self.accuracies(seen).items()}
        figures["frechet"] = float(frechet(features, Moments.of(seen.features)))
        figures["frechet_pixel"] = float(frechet(pixels, Moments.of(seen.pixels)))
        return figures
