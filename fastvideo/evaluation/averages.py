"""Choice of an average on training prompts, which no reported figure uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastvideo.distillation.types import UserError
from fastvideo.evaluation.evaluate import DECODE_UNITS, sample_videos
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.measuring import check_judged
from fastvideo.evaluation.statistics import Estimate
from fastvideo.inference.averages import LARGEST_ERROR, Snapshotted, beside
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import BATCH_SIZE

OWN = "student"
"""Folder of the run's own result."""


@dataclass(frozen=True)
class Measured:
    """One average, or the run's own result (``std`` is ``None``), by number of steps.

    Attributes:
        weights: of the run's own result, as its recipe says.
        error: of the average's profile, relative to it.
    """

    std: float | None
    weights: str
    error: float
    frechet: dict[int, Estimate]
    digit: dict[int, Estimate]


def measure_averages(
    run: Snapshotted,
    stds: Sequence[float],
    *,
    steps: int | None = None,
    prompts: int = 512,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Measured]:
    """Measure the run's result, then each average that the snapshots give, at all of the ladder's steps and at one.

    Args:
        steps: by which the caller decides; has to be among those that are measured.

    Raises:
        UserError: for a model whose videos no judge knows, or other steps, before anything is measured.
    """
    judge = Judge(prompts, seed, split="train")
    own = beside(run, OWN)
    if own.is_dir():
        model = load_model(str(own), exact=True)
        _check_judged(run, model, steps)
        yield _measured(model, judge, batch_size, None, 0.0)
    for std in stds:
        if (error := run.fit(std).error) <= LARGEST_ERROR:
            model = run.average(std).model
            _check_judged(run, model, steps)
            yield _measured(model, judge, batch_size, std, error)


def _check_judged(run: Snapshotted, model: LoadedModel, steps: int | None) -> None:
    """Check that the tiny world knows what the model makes, and that the wanted steps are measured."""
    if not model.is_embedded:
        raise UserError(
            f"--choose: only the tiny world judges on its own, and {run.folder.parent} is not of it; make several "
            f"with --std 0.05 0.1 0.15, and compare them: fastvideo evaluate FOLDER ... --teacher TEACHER "
            f"--prompts FILE, with prompts of the training data"
        )
    if steps is not None and steps not in (counts := _step_counts(model)):
        raise UserError(f"--steps {steps}: this student is measured at {' or '.join(map(str, counts))}")
    check_judged(str(run.folder.parent), model)


def _step_counts(model: LoadedModel) -> tuple[int, ...]:
    """All steps of a student's ladder and one, or the steps of a teacher."""
    own = len(model.sampler().times)
    return tuple(dict.fromkeys((own, 1))) if model.is_student else (own,)


def _measured(model: LoadedModel, judge: Judge, batch_size: int, std: float | None, error: float) -> Measured:
    found = Measured(std, model.recipe.get("weights", ""), error, {}, {})
    frames = judge.first_frames(model.adapter.conditioner)
    label = found.weights if std is None else f"std {std:g}"
    for steps in _step_counts(model):
        sampler = model.sampler(steps)
        units = len(judge.prompts) * (sampler.calls_of(model.adapter.codec.latent_shape[1]) + DECODE_UNITS)
        with PatientBar(f"{label}, {steps} steps", units) as bar:
            seen = sample_videos(
                model, sampler, judge, judge.prompts, judge.seed, batch_size, 0, bar, frames=frames
            ).seen
        found.frechet[steps] = judge.distances(seen)[0]
        found.digit[steps] = judge.accuracies(seen)["digit_accuracy"]
    return found
