"""Validation of a run: what is sampled, and where that goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvideo.distillation.builder import Adapter, Config, Method
from fastvideo.distillation.bundle import velocity_of
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.validation import ValidationHook, ValidationSinks
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import generate
from fastvideo.distillation.types import UserError
from fastvideo.stopping import step_done, unit_done
from fastvideo.training.health import HealthCheck, Subject

WATCHABLE = 128
"""Pixels of height below which a validation video is enlarged."""
VALIDATION_REFERENCE = 512
"""Real videos behind the Frechet distance of a validation: a quick curve, not a figure to report."""


def build_validation(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> ValidationHook:
    """The hook; it writes in the main process alone, and samples there too unless a forward needs all processes.

    Raises:
        UserError: if the config's prompts or images are not what the model goes on from.
    """
    student, folder, every = method.bundle["student"], Path(config.output) / "validation", config.validation.every
    together = processes.forward_together
    if not every or not (processes.is_main or together):
        return ValidationHook(student, None, None, folder, every=every)
    from fastvideo.data.video_io import write_video

    options = config.validation
    prompts: list[str] = list(options.prompts)
    score = None
    if options.world_prompts:
        from fastvideo.evaluation.judge import Judge

        judge = Judge(options.world_prompts, options.seed, reference=VALIDATION_REFERENCE)
        prompts, score = list(judge.prompts), judge.score
        frames = judge.first_frames(adapter.conditioner)
    else:
        frames = _image_frames(config, adapter)
    condition = adapter.conditioner.encode_prompts(prompts) | adapter.conditioner.condition_on(frames)

    def sample(network: nn.Module) -> Tensor:
        generator = seeded(options.seed)

        def draw(like: Tensor) -> Tensor:
            return normal(tuple(like.shape), generator).to(adapter.device)

        noise = draw(torch.empty(len(prompts), *adapter.codec.latent_shape))

        def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
            # Where all processes take part none may leave alone; they agree after the step.
            step_done() if together else unit_done()
            return velocity_of(adapter, network, x_t, t, condition, r=r)

        latents = generate(method.sampler, velocity, noise, method.ladder.times, draw)
        return adapter.codec.decode(latents).float().cpu()

    def write(path: Path, video: Tensor) -> None:
        write_video(path, video, options.fps, scale=max(1, WATCHABLE // video.shape[2]))

    health = None
    if config.health.enabled:
        subject = _subject(config, adapter, method, processes, prompts, frames)
        health = HealthCheck(subject, folder, tracker, write)
    sinks = ValidationSinks(tracker.log, write, score, health)
    return ValidationHook(student, sample, sinks, folder, every=every, writes=processes.is_main)


def _subject(
    config: Config,
    adapter: Adapter,
    method: Method,
    processes: Processes,
    prompts: Sequence[str],
    frames: Tensor | None,
) -> Subject:
    """The first prompts, each as often as there are seeds."""
    rows = [i for i in range(min(config.health.prompts, len(prompts))) for _ in range(config.health.seeds)]
    given = None if frames is None else frames[rows]
    texts = [prompts[i] for i in rows]
    return Subject(config, adapter, method, texts, given, processes.is_main, processes.forward_together)


def _image_frames(config: Config, adapter: Adapter) -> Tensor | None:
    """What the validation's own prompts go on from."""
    from fastvideo.inference.first_frames import read_first_frames

    images, count = config.validation.images, max(adapter.conditioner.first_frames)
    if not images:
        if adapter.conditioner.needs_frames:
            raise UserError("validation.images: this model goes on from an image; give one for every prompt")
        return None
    if not count:
        raise UserError("validation.images: this model generates from text alone")
    size = config.model.height, config.model.width
    return torch.cat([read_first_frames(Path(image), *size, count) for image in images])
