"""Names of metrics, as a user gives them, to metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastvideo.data.video_io import FPS
from fastvideo.errors import UserError
from fastvideo.evaluation.catalogue import VBENCH_DIMENSIONS
from fastvideo.evaluation.external import VBENCH_INSTALL, ClipScore, VBench, VideoDistance
from fastvideo.evaluation.instrument import Instrument, distractors, taps_of
from fastvideo.evaluation.looks import LEAST_FRAMES, LOOKS
from fastvideo.evaluation.metric import Metric
from fastvideo.evaluation.relative import Looks, PromptMatch, SeedDiversity, TeacherDistance
from fastvideo.evaluation.user_data import check_data
from fastvideo.inference.loading import OpenedModel
from fastvideo.wording import did_you_mean

OWN = ("fd_teacher", "prompt_match", *LOOKS, "seed_diversity")
"""Metrics that need the teacher alone."""
VBENCH = tuple(f"vbench_{dimension}" for dimension in VBENCH_DIMENSIONS)
NAMES = (*OWN, "clip_score", "fvd", *VBENCH)


@dataclass(frozen=True)
class Choice:
    """Metrics to measure.

    Attributes:
        names: of :data:`NAMES`.
        clip: a CLIP model, for ``clip_score``.
        fvd_extractor: a TorchScript file, for ``fvd``.
    """

    names: tuple[str, ...]
    clip: str | None = None
    fvd_extractor: Path | None = None

    @property
    def needs_network(self) -> bool:
        """True if the teacher's network is needed."""
        return bool({"fd_teacher", "prompt_match", "seed_diversity"} & set(self.names))


def choose(wanted: Sequence[str], clip: str | None, fvd_extractor: Path | None) -> Choice:
    """Check the wanted metrics; without any, all that need no download and those whose weights are given.

    Raises:
        UserError: for an unknown name, a metric without its weights or its package, or one named twice.
    """
    for name in wanted:
        if name not in NAMES:
            raise UserError(f"--metrics: unknown {name!r}{did_you_mean(name, NAMES)}; one of {', '.join(NAMES)}")
        if wanted.count(name) > 1:
            raise UserError(f"--metrics: {name} is given twice")
    given = [name for name, weights in (("clip_score", clip), ("fvd", fvd_extractor)) if weights is not None]
    if (vbench := set(VBENCH) & set(wanted)) and importlib.util.find_spec("vbench") is None:
        raise UserError(f"--metrics {min(vbench)}: the package vbench is missing: {VBENCH_INSTALL}")
    choice = Choice(tuple(dict.fromkeys((*(wanted or OWN), *given))), clip, fvd_extractor)
    for name, remedy in absent(choice):
        if name in wanted:
            raise UserError(f"--metrics {name}: {remedy}")
    return choice


def absent(choice: Choice) -> list[tuple[str, str]]:
    """Metrics that cannot be measured, or are not, each with the way to have it."""
    remedies = []
    if choice.clip is None:
        remedies.append(("clip_score", "give --clip PATH, a CLIP model such as openai/clip-vit-base-patch32"))
    if choice.fvd_extractor is None:
        remedies.append(("fvd", "give --fvd-extractor FILE, a TorchScript network such as i3d_torchscript.pt"))
    if not set(VBENCH) & set(choice.names):
        remedies.append(("vbench", f"{VBENCH_INSTALL}, then --metrics {VBENCH[0]} ..."))
    return remedies


def of_frames(choice: Choice, wanted: Sequence[str], frames: int) -> tuple[Choice, list[tuple[str, str]]]:
    """The choice without what videos of so many frames do not have, and that, each with the reason.

    Raises:
        UserError: for one of those that is ``wanted`` by name.
    """
    shown = "is a still" if frames == 1 else f"has {frames} frames"
    short = [
        (name, f"it compares {LEAST_FRAMES[name]} frames, and a sample here {shown}")
        for name in choice.names
        if frames < LEAST_FRAMES.get(name, 0)
    ]
    for name, reason in short:
        if name in wanted:
            raise UserError(f"--metrics {name}: {reason}")
    return replace(choice, names=tuple(name for name in choice.names if name not in dict(short))), short


def check_teacher(choice: Choice, teacher: OpenedModel, prompts: Sequence[str], data: Path | None) -> None:
    """Check that the teacher, the prompts and the user's data can give the chosen metrics, before anything is sampled.

    Raises:
        UserError: if they cannot.
    """
    if choice.needs_network:
        taps_of(teacher.adapter)
    if "prompt_match" in choice.names:
        distractors(prompts)
    if data is not None:
        check_data(data, teacher)


def teacher_metrics(
    choice: Choice, instrument: Instrument | None, prompts: Sequence[str], data: Tensor | None, seeds: int
) -> list[Metric]:
    """The chosen metrics that need the teacher or the videos alone.

    Args:
        choice: names.
        instrument: the teacher; ``None`` if :attr:`Choice.needs_network` is false.
        prompts: of the measurement.
        data: the teacher's features ``[M, S, D]`` of the user's data, if any.
        seeds: videos of one prompt that are compared for diversity.
    """
    names, found = set(choice.names), list[Metric]()
    if instrument is not None:
        if "fd_teacher" in names:
            found.append(TeacherDistance(instrument, data))
        if "prompt_match" in names:
            found.append(PromptMatch(instrument, prompts))
        if "seed_diversity" in names:
            found.append(SeedDiversity(instrument, seeds))
    if looks := [name for name in LOOKS if name in names]:
        found.append(Looks(looks))
    return found


def external_metrics(choice: Choice, device: str) -> list[Metric]:
    """The chosen metrics with weights of others, loaded.

    Raises:
        UserError: for weights that cannot be loaded, or a missing package.
    """
    found: list[Metric] = []
    if choice.clip is not None:
        found.append(ClipScore(choice.clip, device))
    if choice.fvd_extractor is not None:
        found.append(VideoDistance(choice.fvd_extractor, device))
    if dimensions := [name.removeprefix("vbench_") for name in choice.names if name in VBENCH]:
        found.append(VBench(dimensions, device, FPS))
    return found
