"""One run: folder, data, trainer with its hooks, result."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.data.order import SampleStream
from fastvideo.distillation.builder import Adapter, Config, Method, build_adapter, build_method
from fastvideo.distillation.bundle import velocity_of
from fastvideo.distillation.engine.checkpoint import CheckpointHook
from fastvideo.distillation.engine.distributed import Processes, barrier, start_processes, stop_processes
from fastvideo.distillation.engine.ema import EMAHook
from fastvideo.distillation.engine.non_finite import NonFiniteGuard
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.validation import ValidationHook, ValidationSinks
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import generate
from fastvideo.distillation.trainer import DistillTrainer, Hook, LoopOptions
from fastvideo.distillation.types import UserError
from fastvideo.inference.recipe import result_recipe
from fastvideo.training.data import build_data
from fastvideo.training.output import check_output, prepare_output

WATCHABLE = 128
"""Pixels of height below which a validation video is enlarged."""
VALIDATION_REFERENCE = 512
"""Real videos behind the Frechet distance of a validation: a quick curve, not a figure to report."""


def run(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as configured; the folder of the result (a model folder with its recipe).

    Raises:
        UserError: for a mistake in the config, the data, the model folder or the output folder.
    """
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    # Weights that decay towards zero become denormal, and arithmetic on those is many times slower on a CPU.
    torch.set_flush_denormal(True)
    processes = start_processes(config.device)
    try:
        return _run(config, processes, resume=resume, overwrite=overwrite)
    finally:
        stop_processes()


def _run(config: Config, processes: Processes, *, resume: bool, overwrite: bool) -> Path:
    output = Path(config.output)
    check_output(config, resume=resume, overwrite=overwrite)
    barrier()
    adapter = build_adapter(config, processes)
    method = build_method(config, adapter, processes)
    data, description = _build_data_once(config, adapter, processes)
    tracker = Tracker(output, enabled=processes.is_main)
    trainer = build_trainer(config, adapter, method, tracker, processes)
    checkpoint = _checkpoint_hook(config, trainer, data, processes)
    step = checkpoint.restore() if resume else 0
    if processes.is_main:
        prepare_output(config, overwrite=overwrite)
    barrier()
    if resume:
        tracker.rewind(step)
        tracker.say(f"resumed at step {step} from {checkpoint.folder}")
    trainer.hooks = (*trainer.hooks, checkpoint)
    tracker.say(f"training on {description}, in batches of {config.data.batch_size}")
    for note in method.notes:
        tracker.say(note)
    trainer.run(data)
    if processes.is_main:
        save_result(config, adapter, method, output / "student")
        tracker.say(f"saved {output / 'student'}")
    return output / "student"


def _build_data_once(config: Config, adapter: Adapter, processes: Processes) -> tuple[SampleStream, str]:
    """The data, with the main process first: what it computes and caches, the others only read."""
    if processes.is_main:
        data = build_data(config, adapter, processes)
    barrier()
    return data if processes.is_main else build_data(config, adapter, processes)


def build_trainer(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> DistillTrainer:
    """The trainer with its averaging and validation hooks."""
    student = method.bundle["student"]
    averages = [EMAHook(student, config.ema.decay, config.ema.start_step)] if config.ema.enabled else []
    hooks: list[Hook] = []
    if config.validation.every and processes.is_main:
        hooks.append(_validation_hook(config, adapter, method, tracker))
    names = ("max_steps", "grad_accumulation", "max_grad_norm", "log_every")
    options = LoopOptions(**config.trainer.model_dump(include=set(names)))
    prepare = partial(adapter.prepare, any_size=config.data.buckets)
    folder = Path(config.output) / "non_finite"
    guard = NonFiniteGuard(config.trainer.non_finite, config.trainer.max_skips, folder, processes.rank)
    return DistillTrainer(method, prepare, options, tracker, hooks, averages=averages, guard=guard)


def _checkpoint_hook(
    config: Config, trainer: DistillTrainer, data: SampleStream, processes: Processes
) -> CheckpointHook:
    parts: dict[str, Any] = {handle.name: handle for handle in trainer.method.bundle if handle.trainable}
    parts |= {"method": trainer.method, "trainer": trainer, "rng": trainer.method.rng, "data": data}
    options = config.checkpoint
    return CheckpointHook(
        Path(config.output) / "checkpoints",
        parts,
        processes,
        every=options.every,
        keep=options.keep,
        last_step=config.trainer.max_steps,
    )


def _validation_hook(config: Config, adapter: Adapter, method: Method, tracker: Tracker) -> ValidationHook:
    from fastvideo.data.video_io import write_video

    options = config.validation
    prompts: list[str] = list(options.prompts)
    score = None
    if options.world_prompts:
        from fastvideo.evaluation.judge import Judge

        judge = Judge(options.world_prompts, options.seed, reference=VALIDATION_REFERENCE)
        prompts, score = list(judge.prompts), judge.score
        frames = judge.first_frames(adapter)
    else:
        frames = _image_frames(config, adapter)
    condition = adapter.encode_prompts(prompts) | adapter.condition_on(frames)

    def sample(network: nn.Module) -> Tensor:
        generator = seeded(options.seed)

        def draw(like: Tensor) -> Tensor:
            return normal(tuple(like.shape), generator).to(adapter.device)

        noise = draw(torch.empty(len(prompts), *adapter.latent_shape))
        velocity = partial(velocity_of, adapter, network, condition=condition)
        latents = generate(method.sampler, velocity, noise, method.ladder.times, draw)
        return adapter.decode(latents).float().cpu()

    def write(path: Path, video: Tensor) -> None:
        write_video(path, video, options.fps, scale=max(1, WATCHABLE // video.shape[2]))

    sinks = ValidationSinks(tracker.log, write, score)
    return ValidationHook(
        method.bundle["student"], sample, sinks, Path(config.output) / "validation", every=options.every
    )


def _image_frames(config: Config, adapter: Adapter) -> Tensor | None:
    """What the validation's own prompts go on from."""
    from fastvideo.inference.first_frames import read_first_frames

    images, count = config.validation.images, max(adapter.first_frames)
    if not images:
        if adapter.needs_frames:
            raise UserError("validation.images: this model goes on from an image; give one for every prompt")
        return None
    if not count:
        raise UserError("validation.images: this model generates from text alone")
    size = config.model.height, config.model.width
    return torch.cat([read_first_frames(Path(image), *size, count) for image in images])


def save_result(config: Config, adapter: Adapter, method: Method, folder: Path) -> None:
    """The student as a model folder: averaged weights if there are any, and the recipe that samples from it."""
    student = method.bundle["student"]
    recipe = result_recipe(config, adapter, "live" if student.ema is None else "ema", config.trainer.max_steps)
    partial_folder = folder.with_name(f"{folder.name}.partial")  # a save that is cut off must not look like a result
    shutil.rmtree(partial_folder, ignore_errors=True)
    adapter.save_pipeline(partial_folder, student.ema if student.ema is not None else student.network, recipe)
    if folder.is_dir():
        shutil.rmtree(folder)
    partial_folder.rename(folder)
