"""Measure models under samplers: every row of the comparison has the same prompts and noise."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.environment import environment
from fastvideo.evaluation.frechet import Moments, frechet
from fastvideo.evaluation.judge import DIVERSITY_SEEDS, Judge, Observed
from fastvideo.evaluation.measuring import check_judged
from fastvideo.evaluation.metrics import Row, SampledRow
from fastvideo.evaluation.rows import RowSpec
from fastvideo.inference.loading import LoadedModel, OpenedModel, load_model
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import BATCH_SIZE, ProgressFn, Sampling, sample_batches, sample_latents
from fastvideo.tiny.classifier import WEIGHTS_NAME
from fastvideo.tiny.paths import CLASSIFIER_FOLDER
from fastvideo.tiny.world import SIZE

RowT = TypeVar("RowT", bound=SampledRow)
DECODE_UNITS = 2
"""Weight of decoding one video on the progress bar, in network calls."""


@dataclass(frozen=True)
class Evaluation(Generic[RowT]):
    """Rows by name, with the first videos ``[V, 3, T, H, W]`` of each row for the same ``prompts``.

    ``students``: :func:`students_of` the rows.
    """

    rows: Mapping[str, RowT]
    videos: Mapping[str, Tensor]
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]
    students: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: each row under its name, ``evaluation`` with the settings they share, and ``students``."""
        rows = {name: row.to_dict() for name, row in self.rows.items()}
        return {**rows, "evaluation": dict(self.settings), "students": dict(self.students)}


@dataclass(frozen=True)
class Sampled:
    """One pass over prompts: the judge's observations, the first videos, and seconds per video.

    Seconds are the median over batches, robust to other load on the machine.
    """

    seen: Observed
    videos: Tensor
    denoise_seconds: float
    decode_seconds: float


def evaluate_rows(
    rows: Mapping[str, RowSpec],
    *,
    prompts: int = 512,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    keep_videos: int = 12,
    device: str = "cpu",
    judge: Judge | None = None,
) -> Evaluation[Row]:
    """Measure every row on the same prompts and noise; the floor is that of the first row's VAE.

    Args:
        rows: model folders and samplers, by name.
        prompts: held-out prompts.
        seed: chooses prompts and noise.
        keep_videos: number of videos per row to return.
        judge: replaces the held-out one of ``prompts`` and ``seed``.

    Raises:
        UserError: for a bad folder or sampler or a model of another world, before anything is sampled.
    """
    models = {spec.folder: load_model(spec.folder, device=device) for spec in rows.values()}
    for name, spec in rows.items():
        check_judged(name, models[spec.folder])
    samplers = {name: spec.sampler(models[spec.folder]) for name, spec in rows.items()}
    judge = judge or Judge(prompts, seed)
    text_seconds = {folder: warm_up(model, judge.prompts) for folder, model in models.items()}
    floors = vae_floor(next(iter(models.values())), judge, batch_size)
    measured: dict[str, Row] = {}
    videos: dict[str, Tensor] = {}
    for name, spec in rows.items():
        sampled, others = _sample_row(models[spec.folder], samplers[name], judge, batch_size, keep_videos, name)
        kind, seconds = kind_of_row(spec, models[spec.folder]), text_seconds[spec.folder]
        measured[name] = _row(judge, samplers[name], sampled, others, floors, seconds, batch_size, kind)
        videos[name] = sampled.videos
    settings, students = _settings(judge, batch_size, device), students_of(rows, models)
    return Evaluation(measured, videos, judge.prompts[:keep_videos], settings, students)


def kind_of_row(spec: RowSpec, model: OpenedModel) -> str:
    """The kind of a row, see :class:`SampledRow`."""
    if spec.ladder is not None and not model.is_student:
        return "untrained"
    return "student" if model.is_student else "teacher"


def students_of(rows: Mapping[str, RowSpec], models: Mapping[str, OpenedModel]) -> dict[str, dict[str, Any]]:
    """The rows of trained models: folder, steps of the training and kind of weights; ``models`` are by folder."""
    found = {name: {"folder": spec.folder, **models[spec.folder].recipe} for name, spec in rows.items()}
    kept = ("folder", "steps", "weights")
    return {name: {key: one.get(key) for key in kept} for name, one in found.items() if "steps" in one}


def warm_up(model: LoadedModel, prompts: Sequence[str]) -> float:
    """Load the lazy parts, so that timings exclude first use; returns seconds per prompt of text encoding."""
    shape, conditioner = (2, *model.adapter.codec.latent_shape), model.adapter.conditioner
    conditioner.encode_prompts(["", ""])
    given = of_frames(conditioner)
    grey = torch.zeros(2, 3, max(given.first_frames), SIZE, SIZE) if given.needs_frames else None
    once = Sampling(["", ""], SamplerSpec((1.0,), 1.0, "euler"), 0, frames=grey)
    sample_latents(model.adapter, model.denoiser, once)
    model.adapter.codec.decode(torch.zeros(shape, device=model.adapter.device))
    begin = time.perf_counter()
    conditioner.encode_prompts(prompts)
    return (time.perf_counter() - begin) / len(prompts)


def vae_floor(model: OpenedModel, judge: Judge, batch_size: int = BATCH_SIZE) -> tuple[float, float]:
    """Frechet distances of the prompts' real videos after the VAE: the score of a perfect model of the latents.

    It is not zero, because the sample is finite and the VAE lossy.
    """
    real = judge.real_videos()
    parts = []
    with PatientBar("real videos through the VAE", len(real)) as bar:
        for start in range(0, len(real), batch_size):
            videos = real[start : start + batch_size]
            decoded = model.adapter.codec.decode(model.adapter.codec.encode(videos.to(model.adapter.device)))
            parts.append(judge.observe(decoded.float().cpu().clamp(-1, 1)))
            bar(len(videos))
    seen = Observed.join(parts)
    features, pixels = judge.reference
    return float(frechet(features, Moments.of(seen.features))), float(frechet(pixels, Moments.of(seen.pixels)))


def _sample_row(
    model: LoadedModel, spec: SamplerSpec, judge: Judge, batch_size: int, keep: int, label: str
) -> tuple[Sampled, Observed]:
    """One video per prompt, and further ones of the diversity prompts."""
    again = [judge.prompts[i] for i in judge.diversity_task.positions.tolist() for _ in range(DIVERSITY_SEEDS - 1)]
    calls = spec.calls_of(model.adapter.codec.latent_shape[1])
    units = (len(judge.prompts) + len(again)) * (calls + DECODE_UNITS)
    with PatientBar(label, units) as bar:
        frames = judge.first_frames(model.adapter.conditioner)
        sampled = sample_videos(model, spec, judge, judge.prompts, judge.seed, batch_size, keep, bar, frames=frames)
        if frames is not None:
            frames = frames[judge.diversity_task.positions].repeat_interleave(DIVERSITY_SEEDS - 1, dim=0)
        others = sample_videos(
            model, spec, judge, again, judge.seed + 1, batch_size, 0, bar, frames=frames
        )  # fresh noise
    return sampled, others.seen


def sample_videos(
    model: LoadedModel,
    spec: SamplerSpec,
    judge: Judge,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    keep: int,
    progress: ProgressFn,
    *,
    frames: Tensor | None = None,
) -> Sampled:
    """Generate, decode and observe videos batch by batch; seconds exclude the judge."""
    parts: list[Observed] = []
    kept: list[Tensor] = []
    denoise: list[float] = []
    decode: list[float] = []
    wanted = Sampling(prompts, spec, seed, batch_size, frames=frames)
    for batch in sample_batches(model.adapter, model.denoiser, wanted, progress):
        begin = time.perf_counter()
        videos = model.adapter.codec.decode(batch.latents.to(model.adapter.device)).float().cpu().clamp(-1, 1)
        decode.append((time.perf_counter() - begin) / len(videos))
        denoise.append(batch.seconds / len(videos))
        parts.append(judge.observe(videos))
        kept.append(videos[: max(0, keep - sum(map(len, kept)))].clone())
        progress(DECODE_UNITS * len(videos))
    return Sampled(Observed.join(parts), torch.cat(kept), median(denoise), median(decode))


def _row(
    judge: Judge,
    spec: SamplerSpec,
    sampled: Sampled,
    others: Observed,
    floors: tuple[float, float],
    text_seconds: float,
    batch_size: int,
    kind: str,
) -> Row:
    distance, pixel_distance = judge.distances(sampled.seen)
    return Row(
        **judge.accuracies(sampled.seen),
        frechet=distance,
        frechet_pixel=pixel_distance,
        frechet_floor=floors[0],
        frechet_pixel_floor=floors[1],
        diversity=judge.diversity(sampled.seen, others),
        samples=len(sampled.seen.read),
        network_calls=spec.network_calls,
        steps=len(spec.times),
        guidance=spec.guidance,
        sampler=spec.kind,
        denoise_seconds_per_video=sampled.denoise_seconds,
        end_to_end_seconds_per_video=text_seconds + sampled.denoise_seconds + sampled.decode_seconds,
        batch_size=batch_size,
        kind=kind,
    )


def _settings(judge: Judge, batch_size: int, device: str) -> dict[str, Any]:
    return {
        "prompts": len(judge.prompts),
        "seed": judge.seed,
        "split": judge.world.split,
        "reference_videos": judge.reference_videos,
        "prompts_sha256": hashlib.sha256("\n".join(judge.prompts).encode()).hexdigest(),
        "judge_sha256": hashlib.sha256((CLASSIFIER_FOLDER / WEIGHTS_NAME).read_bytes()).hexdigest(),
        "batch_size": batch_size,
        "device": device,
        "threads": torch.get_num_threads(),
        **environment(),
    }
