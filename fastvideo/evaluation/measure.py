"""Measure models against a teacher: sample all of them once, then let each metric look at the videos."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastvideo.data.model import SIZES
from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import Codec
from fastvideo.distillation.sample import SamplerSpec, prompt_seeds
from fastvideo.environment import environment
from fastvideo.errors import UserError
from fastvideo.evaluation.evaluate import Evaluation, kind_of_row, students_of
from fastvideo.evaluation.metric import Batch, Figures, Metric, Seen
from fastvideo.evaluation.metrics import JudgedRow
from fastvideo.evaluation.rows import RowSpec
from fastvideo.evaluation.samples import FOLDER, Clips, Samples, fill, sample_key
from fastvideo.evaluation.statistics import resample_counts
from fastvideo.inference.loading import OpenedModel, load_recipe, open_model, unloaded, with_network
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import BATCH_SIZE
from fastvideo.shares import ALONE, Share

SEEDS = 4
"""Videos of one prompt, where several seeds are compared."""
SEED_PROMPTS = 16
"""Prompts of which several seeds are compared."""
POSITIONS = 21 * 60 * 104
"""Latent positions (frames, rows, columns) of a batch, by default."""
TIMED_PROMPTS = 16
"""Prompts whose encoding is timed."""


@dataclass(frozen=True)
class Task:
    """Models and prompts of a measurement.

    Attributes:
        rows: models with their samplers by name, the teacher's among them.
        teacher: name of the teacher's row.
        prompts: one video each; those of ``repeated`` get :data:`SEEDS`.
        seed: of the noise.
        out: folder that keeps the samples.
        repeated: numbers of the prompts of which several seeds are compared; by default the first, empty for none.
        batch_size: videos that are denoised and decoded together.
        device: cpu, cuda, cuda:1, mps.
        options: fields of the families' configs that replace those of the models' recipes, such as ``precision``.
    """

    rows: Mapping[str, RowSpec]
    teacher: str
    prompts: tuple[str, ...]
    seed: int
    out: Path
    repeated: tuple[int, ...] | None = None
    batch_size: int = 8
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def several(self) -> tuple[int, ...]:
        """Numbers of the prompts of which several seeds are compared."""
        first = tuple(range(min(SEED_PROMPTS, len(self.prompts))))
        return first if self.repeated is None else self.repeated

    @property
    def clips(self) -> Clips:
        """All videos of one model: one per prompt, then further seeds of some, prompt by prompt."""
        again = [self.prompts[row] for row in self.several for _ in range(SEEDS - 1)]
        return Clips((*self.prompts, *again), self.seed)

    def numbers(self, of_seeds: bool) -> list[int]:
        """Numbers of the clips: one per prompt, or several seeds of some prompts, prompt by prompt."""
        count, more = len(self.prompts), SEEDS - 1
        if not of_seeds:
            return list(range(count))
        starts = [(row, count + more * place) for place, row in enumerate(self.several)]
        return [number for row, start in starts for number in (row, *range(start, start + more))]


@dataclass(frozen=True)
class Opened:
    """A row ready to be sampled: its model without weights, its sampler, its samples on disk."""

    model: OpenedModel
    sampler: SamplerSpec
    samples: Samples
    kind: str


def open_rows(task: Task) -> dict[str, Opened]:
    """Open all models and compare their latents with the teacher's, before anything is loaded or sampled.

    Raises:
        UserError: for a bad folder or sampler, a model that starts from an image, or another latent space.
    """
    if len(task.prompts) < 2:
        raise UserError(f"evaluation needs at least 2 prompts, got {len(task.prompts)}")
    models = _open_models(task)
    teacher = models[task.rows[task.teacher].folder]
    for model in models.values():
        model.adapter.conditioner.check_prompts(task.prompts)
    for name, spec in task.rows.items():
        _check_alike(name, models[spec.folder], task.teacher, teacher)
    clips = task.clips
    found = {}
    for name, spec in task.rows.items():
        model = models[spec.folder]
        sampler = spec.sampler(model)
        samples = Samples(task.out / FOLDER, sample_key(model, sampler), clips)
        found[name] = Opened(model, sampler, samples, kind_of_row(spec, model))
    return found


def _open_models(task: Task) -> dict[str, OpenedModel]:
    """Models by folder. A teacher without sizes, such as one of the hub, takes those of the first student."""
    own = task.rows[task.teacher].folder
    students = {spec.folder: dict[str, Any]() for spec in task.rows.values() if spec.folder != own}
    models = {folder: open_model(folder, task.options, task.device) for folder in students}
    sizes = {}
    if models and "model" not in load_recipe(own):
        config = next(iter(models.values())).adapter.config.model_dump()
        sizes = {name: config[name] for name in SIZES if name in config}
    return {**models, own: open_model(own, {**sizes, **task.options}, task.device)}


def _check_alike(name: str, model: OpenedModel, teacher_name: str, teacher: OpenedModel) -> None:
    if of_frames(model.adapter.conditioner).needs_frames:
        raise UserError(f"{name} starts from an image: --teacher measures models of text alone")
    ours, theirs = model.adapter.codec, teacher.adapter.codec
    if ours.latent_shape != theirs.latent_shape:
        raise UserError(
            f"{name} makes latents {ours.latent_shape} (C, F, H, W) and its teacher {teacher_name} makes "
            f"{theirs.latent_shape}: a teacher judges videos of its own size; name the teacher that the student was "
            f"distilled from, or give both recipe.json the same height, width and num_frames"
        )
    if ours.latent_key != theirs.latent_key:
        raise UserError(f"{name} and its teacher {teacher_name} have different VAEs: a teacher judges its own latents")


def sample_rows(task: Task, rows: Mapping[str, Opened], share: Share = ALONE) -> int:
    """Sample all that is missing of a ``share``, one model in memory at a time; returns the number of videos."""
    count = 0
    for name, row in rows.items():
        if row.samples.missing(share):
            model = with_network(unloaded(row.model))
            count += fill(row.samples, model, row.sampler, task.batch_size, name, share)
    return count


def batch_size_for(latent_shape: Sequence[int]) -> int:
    """Videos at once whose latents have about as many positions as one of 81 frames at 480 x 832."""
    return max(1, min(BATCH_SIZE, POSITIONS // math.prod(latent_shape[1:])))


@dataclass(frozen=True)
class Looked:
    """All that each metric observed of one model; the first videos ``[V, 3, T, H, W]``; seconds to decode one."""

    seen: Mapping[Metric, Seen]
    videos: Tensor
    decode_seconds: float


def measure(
    task: Task, rows: Mapping[str, Opened], metrics: Sequence[Metric], keep_videos: int, settings: Mapping[str, Any]
) -> Evaluation[JudgedRow]:
    """Observe every row's videos and compare them with the teacher's."""
    teacher = rows[task.teacher].model
    looked = {name: look(task, row.samples, metrics, teacher, keep_videos, name) for name, row in rows.items()}
    seconds = _text_seconds(teacher, task.prompts)
    theirs = looked[task.teacher]
    measured = {
        name: judged_row(task, row, judged_figures(task, metrics, looked[name], theirs), looked[name], seconds)
        for name, row in rows.items()
    }
    about = {
        "prompts": len(task.prompts),
        "seed": task.seed,
        "teacher": task.teacher,
        "teacher_key": rows[task.teacher].samples.folder.name,
        "prompts_sha256": hashlib.sha256("\n".join(task.prompts).encode()).hexdigest(),
        "batch_size": task.batch_size,
        "device": task.device,
        **environment(),
        **settings,
    }
    videos = {name: one.videos for name, one in looked.items()}
    students = students_of(task.rows, {task.rows[name].folder: row.model for name, row in rows.items()})
    return Evaluation(measured, videos, task.prompts[:keep_videos], about, students)


def look(
    task: Task, samples: Samples, metrics: Sequence[Metric], teacher: OpenedModel, keep: int, label: str
) -> Looked:
    """Show each metric the clips that it observes, a batch at a time; keep the first videos."""
    parts: dict[Metric, list[Seen]] = {metric: [] for metric in metrics}
    kept: list[Tensor] = []
    decode: list[float] = []
    for of_seeds in (False, True):
        observing = [metric for metric in metrics if metric.of_seeds == of_seeds]
        numbers = task.numbers(of_seeds) if observing or not of_seeds else []
        for batch in _batches(task, samples, numbers, teacher.adapter.codec, label):
            for metric in observing:
                parts[metric].append(metric.observe(batch))
            if not of_seeds and len(kept) < keep:
                kept += batch.videos[: keep - len(kept)].clone()
            decode += batch.decode_seconds
    return Looked({metric: _joined(found) for metric, found in parts.items()}, torch.stack(kept), median(decode))


def _batches(task: Task, samples: Samples, numbers: Sequence[int], codec: Codec, label: str) -> Iterator[Batch]:
    """Clips by number, with a progress bar."""
    seeds, prompts = prompt_seeds(samples.clips.seed, samples.clips.prompts), samples.clips.prompts
    with PatientBar(f"{label}: measuring", max(1, len(numbers))) as bar:
        for some, latents in samples.batches(numbers, task.batch_size):
            yield Batch([prompts[n] for n in some], [seeds[n] for n in some], latents, codec)
            bar(len(some))


def _joined(parts: Sequence[Seen]) -> Seen:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _text_seconds(teacher: OpenedModel, prompts: Sequence[str]) -> float:
    """Seconds of text encoding per prompt, after the encoder is loaded."""
    conditioner, few = teacher.adapter.conditioner, [f"{prompt} " for prompt in prompts[:TIMED_PROMPTS]]
    conditioner.encode_prompts(few[:1])
    begin = time.perf_counter()
    conditioner.encode_prompts(few)
    return (time.perf_counter() - begin) / len(few)


def judged_figures(task: Task, metrics: Sequence[Metric], ours: Looked, theirs: Looked) -> Figures:
    """The figures of all metrics."""
    found: Figures = {}
    for metric in metrics:
        counts = resample_counts(len(task.several if metric.of_seeds else task.prompts), task.seed)
        found |= metric.figures(ours.seen[metric], theirs.seen[metric], counts)
    return found


def judged_row(task: Task, row: Opened, figures: Figures, looked: Looked, text_seconds: float) -> JudgedRow:
    """Figures with the sampler that made the videos, and seconds per video."""
    denoise = median(row.samples.seconds(range(len(task.prompts))))
    return JudgedRow(
        figures=figures,
        samples=len(task.prompts),
        network_calls=row.sampler.network_calls,
        steps=len(row.sampler.times),
        guidance=row.sampler.guidance,
        sampler=row.sampler.kind,
        denoise_seconds_per_video=denoise,
        end_to_end_seconds_per_video=text_seconds + denoise + looked.decode_seconds,
        batch_size=task.batch_size,
        kind=row.kind,
    )
