"""Validation of a run: prompts, and where their videos go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames, of_texts
from fastvideo.distillation.builder import Adapter, Config, Method
from fastvideo.distillation.chunks import spans
from fastvideo.distillation.config.causal import streaming
from fastvideo.distillation.config.schema import ValidationConfig
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.runtime import Processes, Tracker
from fastvideo.distillation.engine.validation import ValidationHook, ValidationSinks
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.types import UserError
from fastvideo.inference.sampler import Sampling
from fastvideo.training.health import HealthCheck
from fastvideo.training.shared_sampling import SharedSampler
from fastvideo.training.texts import conditioners_of

if TYPE_CHECKING:
    from fastvideo.evaluation.judge import Judge
    from fastvideo.evaluation.streams.world import StreamJudge

WATCHABLE = 128
"""Pixels of height below which a validation video is enlarged."""
VALIDATION_REFERENCE = 512
"""Real videos behind the Frechet distance of a validation: a quick curve, not a figure to report."""


def build_validation(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> ValidationHook:
    """The hook; all processes sample, and the main one scores and writes.

    Raises:
        UserError: if the config's prompts or images are not what the model goes on from.
    """
    student, folder, every = method.bundle["student"], Path(config.output) / "validation", config.validation.every
    if not every:
        return ValidationHook(student, None, None, folder, every=every)
    from fastvideo.data.video_io import write_video

    options = config.validation
    prompts: list[str] = list(options.prompts)
    score, length = None, _latent_frames(config, adapter, method)
    if options.world_prompts:
        judge = _world_judge(options, adapter)
        prompts, score = list(judge.prompts), judge.score
        frames = judge.first_frames(adapter.conditioner)
    else:
        frames = _image_frames(config, adapter)
    for conditioner in conditioners_of(role.adapter for role in method.bundle):  # health samples the teacher too
        of_texts(conditioner).keep_texts(prompts)
    sampler = SamplerSpec.student(method.ladder, kind=method.sampler)
    if (own := streaming(method.config)) is not None:
        sampler = replace(sampler, reach=own.reach, context_time=own.context_time, first_times=own.first_times)
    wanted = Sampling(prompts, sampler, options.seed, config.validation_batch, frames=frames, latent_frames=length)
    shared = SharedSampler(adapter, processes)

    def sample(denoiser: Denoiser) -> Tensor | None:
        return shared.videos(denoiser, wanted)

    def write(path: Path, video: Tensor) -> None:
        write_video(path, video, options.fps, scale=max(1, WATCHABLE // video.shape[2]))

    health = None
    if config.health.enabled:
        health = HealthCheck(config, method, shared, _of_health(config, wanted), folder, tracker, write)
    sinks = ValidationSinks(tracker.log, write, score, health)
    return ValidationHook(student, sample, sinks, folder, every=every, weights=options.weights)


def _latent_frames(config: Config, adapter: Adapter, method: Method) -> int | None:
    """Latent frames of longer streams than the model's videos; none where the config asks for none."""
    frames, own = config.validation.frames, streaming(method.config)
    if frames is None:
        return None
    if own is None or own.reach is None:
        raise UserError(
            f"validation.frames: {config.distill_method} trains a model of whole videos, which have the length of the "
            f"model; leave it out"
        )
    try:
        count = latent_frames(frames, adapter.codec.temporal)
        spans(count, own.reach.chunk)
    except UserError as error:
        raise UserError(f"validation.frames: {error}") from error
    return count


def _world_judge(options: ValidationConfig, adapter: Adapter) -> Judge | StreamJudge:
    """The judge of the tiny world, or of the one without edges for videos longer than that world's."""
    from fastvideo.evaluation.judge import Judge
    from fastvideo.evaluation.measuring import check_validated, video_shape
    from fastvideo.evaluation.streams.world import StreamJudge
    from fastvideo.tiny.classifier import FRAMES

    check_validated(adapter)
    frames = options.frames or video_shape(adapter)[0]
    if frames == FRAMES:
        return Judge(options.world_prompts, options.seed, reference=VALIDATION_REFERENCE)
    return StreamJudge(options.world_prompts, options.seed, frames, reference=VALIDATION_REFERENCE)


def _of_health(config: Config, wanted: Sampling) -> Sampling:
    """The first prompts, each as often as there are seeds."""
    prompts, seeds = wanted.prompts, config.health.seeds
    rows = [i for i in range(min(config.health.prompts, len(prompts))) for _ in range(seeds)]
    frames = None if wanted.frames is None else wanted.frames[rows]
    return Sampling([prompts[i] for i in rows], wanted.sampler, wanted.seed, wanted.batch_size, frames=frames)


def _image_frames(config: Config, adapter: Adapter) -> Tensor | None:
    """Conditioning frames of the validation's own prompts."""
    from fastvideo.inference.first_frames import read_first_frames

    images, count = config.validation.images, max(of_frames(adapter.conditioner).first_frames)
    if not images:
        if of_frames(adapter.conditioner).needs_frames:
            raise UserError("validation.images: this model goes on from an image; give one for every prompt")
        return None
    if not count:
        raise UserError("validation.images: this model generates from text alone")
    size = config.model.height, config.model.width
    return torch.cat([read_first_frames(Path(image), *size, count) for image in images])
