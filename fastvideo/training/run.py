"""One run: folder, data, trainer with its hooks, result."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvideo.data.order import SampleStream
from fastvideo.distillation.builder import Adapter, Config, Method, build_adapter, build_method
from fastvideo.distillation.bundle import velocity_of
from fastvideo.distillation.engine.distributed import (
    Processes,
    barrier,
    check_agreement,
    naming_lost_processes,
    start_processes,
    stop_processes,
)
from fastvideo.distillation.engine.ema import EMAHook, averaged
from fastvideo.distillation.engine.memory import keep_freed_memory
from fastvideo.distillation.engine.non_finite import NonFiniteGuard
from fastvideo.distillation.engine.placement import whole_network
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.validation import ValidationHook, ValidationSinks
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import generate
from fastvideo.distillation.trainer import DistillTrainer, Hook, LoopOptions
from fastvideo.distillation.types import UserError
from fastvideo.inference.recipe import result_recipe
from fastvideo.training.data import build_data
from fastvideo.training.lock import check_free, locked
from fastvideo.training.output import check_output, prepare_output
from fastvideo.training.resume import already_started, checkpoint_hook, find_checkpoint, flat, go_on

WATCHABLE = 128
"""Pixels of height below which a validation video is enlarged."""
VALIDATION_REFERENCE = 512
"""Real videos behind the Frechet distance of a validation: a quick curve, not a figure to report."""


def run(config: Config, *, resume: bool = False, overwrite: bool = False, resume_from: Path | None = None) -> Path:
    """Train as configured; the folder of the result (a model folder with its recipe).

    Args:
        resume: go on from the newest intact checkpoint of the output folder.
        overwrite: delete what the output folder holds.
        resume_from: go on from this checkpoint; into the output folder that it is in, or into a new one.

    Raises:
        UserError: for a mistake in the config, the data, the model folder or the output folder.
        RunError: if the run cannot go on.
    """
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if config.trainer.keep_freed_memory:
        keep_freed_memory()
    # Weights that decay towards zero become denormal, and arithmetic on those is many times slower on a CPU.
    torch.set_flush_denormal(True)
    layout = config.parallel.model_dump(include={"shard", "replicate", "context", "timeout"})
    processes = start_processes(config.device, **layout)
    try:
        check_agreement("config", flat(config.model_dump(mode="json")))
        if processes.is_main:
            check_free(Path(config.output))
        check_output(config, resume=resume, overwrite=overwrite, resume_from=resume_from)
        barrier()
        with naming_lost_processes(), locked(Path(config.output)) if processes.is_main else nullcontext():
            return _run(config, processes, Launched(resume, overwrite, resume_from))
    finally:
        stop_processes()


@dataclass(frozen=True)
class Launched:
    """What the user said about the output folder."""

    resume: bool
    overwrite: bool
    resume_from: Path | None


def _run(config: Config, processes: Processes, launched: Launched) -> Path:
    output = Path(config.output)
    if processes.is_main:  # another run may have finished here since the first look
        check_output(config, **asdict(launched))
    tracker = Tracker(output, enabled=processes.is_main)
    source = None
    if launched.resume or launched.resume_from:
        source = find_checkpoint(config, processes, launched.resume_from, tracker.say)
    adapter = build_adapter(config, processes)
    method = build_method(already_started(config) if source else config, adapter, processes)
    data, description = _build_data_once(config, adapter, processes)
    trainer = build_trainer(config, adapter, method, tracker, processes)
    if processes.is_main:
        prepare_output(config, overwrite=launched.overwrite)
    barrier()
    for line in go_on(config, source, trainer, data, processes):
        tracker.say(line)
    tracker.rewind(trainer.step)
    checkpoint = checkpoint_hook(config, trainer, data, processes)
    trainer.hooks = (*trainer.hooks, checkpoint)
    tracker.say(f"training on {description}, in batches of {config.data.batch_size}")
    tracker.say(f"{config.distill_model} on {processes.device}: {adapter.kernels}")
    for note in method.notes:
        tracker.say(note)
    try:
        trainer.run(data)
    finally:
        checkpoint.wait()
    save_result(config, adapter, method, output / "student", processes)
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
    averaged_roles = [method.bundle[role] for role in config.ema.roles] if config.ema.enabled else []
    averages = [EMAHook(averaged_roles, config.ema.decay, config.ema.start_step)]
    hooks: list[Hook] = []
    if config.validation.every and (processes.is_main or processes.forward_together):
        hooks.append(_validation_hook(config, adapter, method, tracker, processes))
    names = ("max_steps", "grad_accumulation", "max_grad_norm", "log_every")
    options = LoopOptions(
        **config.trainer.model_dump(include=set(names)),
        context=processes.context,
        sync_every_micro_batch=config.parallel.sync_every_micro_batch,
    )
    prepare = partial(adapter.prepare, any_size=config.data.buckets)
    folder = Path(config.output) / "non_finite"
    guard = NonFiniteGuard(config.trainer.non_finite, config.trainer.max_skips, folder, processes.rank)
    return DistillTrainer(method, prepare, options, tracker, hooks, averages=averages, guard=guard)


def _validation_hook(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> ValidationHook:
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
    folder = Path(config.output) / "validation"
    return ValidationHook(
        method.bundle["student"], sample, sinks, folder, every=options.every, writes=processes.is_main
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


def save_result(config: Config, adapter: Adapter, method: Method, folder: Path, processes: Processes) -> None:
    """The student as a model folder: averaged weights if there are any, and the recipe that samples from it.

    All processes take part, because each may have a part of the weights; the main one writes.
    """
    student = method.bundle["student"]
    with averaged(student) if student.ema is not None else nullcontext(student.network) as network:
        whole = whole_network(network, adapter, processes)
        if whole is not None:
            _write_result(config, adapter, whole, folder, averaged=student.ema is not None)


def _write_result(config: Config, adapter: Adapter, network: nn.Module, folder: Path, *, averaged: bool) -> None:
    recipe = result_recipe(config, adapter, "ema" if averaged else "live", config.trainer.max_steps)
    partial_folder = folder.with_name(f"{folder.name}.partial")  # a save that is cut off must not look like a result
    shutil.rmtree(partial_folder, ignore_errors=True)
    adapter.save_pipeline(partial_folder, network, recipe)
    if folder.is_dir():
        shutil.rmtree(folder)
    partial_folder.rename(folder)
