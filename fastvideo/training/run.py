"""One run: folder, data, trainer with its hooks, result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvideo.data.order import SampleStream
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import Adapter, Config, Method, build_adapter, build_method
from fastvideo.distillation.engine.attendance import naming_lost_processes
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook
from fastvideo.distillation.engine.checkpoint.manifest import complete_checkpoints
from fastvideo.distillation.engine.ema import EMAHook, averaged
from fastvideo.distillation.engine.lora import ADAPTER_FILE, RoleView, gather_adapter, portable
from fastvideo.distillation.engine.non_finite import NonFiniteGuard
from fastvideo.distillation.engine.optional.memory import keep_freed_memory
from fastvideo.distillation.engine.optional.startup import StartUp
from fastvideo.distillation.engine.optional.trackers import check_installed
from fastvideo.distillation.engine.optional.watchdog import Watchdog
from fastvideo.distillation.engine.parallel.distributed import (
    Processes,
    barrier,
    check_agreement,
    start_processes,
    stop_processes,
)
from fastvideo.distillation.engine.placement import whole_network
from fastvideo.distillation.engine.tracking import Tracker, TrackingOptions
from fastvideo.distillation.trainer import DistillTrainer, LoopOptions
from fastvideo.distillation.types import UserError
from fastvideo.inference.recipe import Weights, result_recipe
from fastvideo.stopping import listening
from fastvideo.training.data import build_data, check_buckets
from fastvideo.training.lock import check_free, locked
from fastvideo.training.output import check_output, prepare_output
from fastvideo.training.resume import already_started, checkpoint_hook, find_checkpoint, flat, go_on, run_parts
from fastvideo.training.validation import build_validation


def run(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: Path | None = None,
    began: float | None = None,
) -> Path:
    """Train as configured; the folder of the result (a model folder with its recipe).

    Args:
        resume: go on from the newest intact checkpoint of the output folder.
        overwrite: delete what the output folder holds.
        resume_from: go on from this checkpoint; into the output folder that it is in, or into a new one.
        began: when the run was asked for (``time.monotonic``), for the time that its first step took to come; now.

    Raises:
        UserError: for a mistake in the config, the data, the model folder or the output folder.
        RunError: if the run cannot go on.
        Stopped: if a signal asked for it; the run goes on from there with ``resume``.
    """
    start = StartUp(time.monotonic() if began is None else began)
    start.reached("imports")
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if config.trainer.keep_freed_memory:
        keep_freed_memory()
    # Weights that decay towards zero become denormal, and arithmetic on those is many times slower on a CPU.
    torch.set_flush_denormal(True)
    layout = config.parallel.model_dump(include={"shard", "replicate", "context", "timeout"})
    with listening(config.trainer.stop_signals):
        processes = start_processes(config.device, **layout)
        try:
            check_agreement("config", flat(config.model_dump(mode="json")))
            if processes.is_main:
                check_free(Path(config.output))
            check_output(config, resume=resume, overwrite=overwrite, resume_from=resume_from)
            barrier()
            with naming_lost_processes(), locked(Path(config.output)) if processes.is_main else nullcontext():
                start.reached("processes")
                return _run(config, processes, Launched(resume, overwrite, resume_from), start)
        finally:
            stop_processes()


@dataclass(frozen=True)
class Launched:
    """What the user said about the output folder."""

    resume: bool
    overwrite: bool
    resume_from: Path | None


def _run(config: Config, processes: Processes, launched: Launched, start: StartUp) -> Path:
    output = Path(config.output)
    if processes.is_main:  # another run may have finished here since the first look
        check_output(config, **asdict(launched))
    for backend in config.tracking.backends:
        check_installed(backend)
    tracker = Tracker(output, enabled=processes.is_main, options=TrackingOptions(**config.tracking.model_dump()))
    source = None
    if launched.resume or launched.resume_from:
        source = find_checkpoint(config, processes, launched.resume_from, tracker.say)
    adapter = build_adapter(config, processes)
    method = build_method(already_started(config) if source else config, adapter, processes)
    start.reached("models")
    data, description = _build_data_once(config, adapter, processes)
    check_buckets(config, adapter, processes, data)
    start.reached("data")
    validation = build_validation(config, adapter, method, tracker, processes)
    trainer = build_trainer(config, adapter, method, tracker, processes)
    if processes.is_main:
        prepare_output(config, overwrite=launched.overwrite)
    barrier()
    data.faults.attach(output, processes.rank)
    check_agreement("dataset", {"steps per epoch": data.rounds})
    parts = run_parts(trainer, data, validation)
    for line in go_on(config, source, parts, data, processes):
        tracker.say(line)
    tracker.rewind(trainer.step)
    checkpoint = checkpoint_hook(config, parts, processes)
    trainer.hooks = (start.tell(tracker), validation, checkpoint)
    trainer.on_stop = partial(_save_for_stop, checkpoint)
    tracker.say(f"training on {description}, in batches of {config.data.batch_size}")
    tracker.say(f"{config.distill_model} on {processes.device}: {adapter.folder.kernels}")
    for note in method.notes:
        tracker.say(note)
    try:
        validation.resume(trainer.step)
        start.reached("preparation")
        with Watchdog(config.trainer.watchdog_seconds, output / "stacks", processes.rank):
            trainer.run(data)
    finally:
        checkpoint.wait()
    save_result(config, adapter, trainer, output / "student", processes)
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
    """The trainer with its averages; what is called after a step comes later."""
    averaged_roles = [method.bundle[role] for role in config.ema.roles] if config.ema.enabled else []
    averages = [EMAHook(averaged_roles, config.ema.decay, config.ema.start_step)]
    if config.trainer.max_cpu_seconds and processes.world_size > 1:
        raise UserError("trainer.max_cpu_seconds: several processes would stop at different steps; give max_steps")
    names = ("max_steps", "max_cpu_seconds", "grad_accumulation", "max_grad_norm", "log_every")
    options = LoopOptions(
        **config.trainer.model_dump(include=set(names)),
        context=processes.context,
        sync_every_micro_batch=config.parallel.sync_every_micro_batch,
    )
    prepare = BatchPreparer(adapter.codec, [adapter.conditioner], any_size=config.data.buckets)
    folder = Path(config.output) / "non_finite"
    guard = NonFiniteGuard(config.trainer.non_finite, config.trainer.max_skips, folder, processes.rank)
    return DistillTrainer(method, prepare, options, tracker, averages=averages, guard=guard)


def _save_for_stop(checkpoint: CheckpointHook, step: int) -> str:
    """Save a run that a signal stops, whether or not it saves otherwise; for the message, where."""
    there = checkpoint.folder / f"step-{step}" in complete_checkpoints(checkpoint.folder)
    if not (checkpoint.due(step) or there):
        checkpoint.save(step)
    checkpoint.wait()
    return f"; saved {checkpoint.folder / f'step-{step}'}, go on with --resume"


def save_result(config: Config, adapter: Adapter, trainer: DistillTrainer, folder: Path, processes: Processes) -> None:
    """The student as a model folder: averaged weights if there are any, and the recipe that samples from it.

    All processes take part, because each may have a part of the weights; the main one writes.
    """
    student = trainer.method.bundle["student"]
    with averaged(student) if student.ema is not None else nullcontext(student.network) as network:
        whole = whole_network(network, adapter, processes)
        lora = portable(gather_adapter(network), network.scaling) if isinstance(network, RoleView) else {}
        if whole is not None:
            weights: Weights = "live" if student.ema is None else "ema"
            _write_result(adapter, whole, result_recipe(config, adapter.folder, weights, trainer.step), lora, folder)


def _write_result(
    adapter: Adapter, network: nn.Module, recipe: Mapping[str, Any], lora: Mapping[str, Tensor], folder: Path
) -> None:
    partial_folder = folder.with_name(f"{folder.name}.partial")  # a save that is cut off must not look like a result
    shutil.rmtree(partial_folder, ignore_errors=True)
    adapter.folder.save(partial_folder, network, recipe)
    if lora:
        save_file(dict(lora), partial_folder / ADAPTER_FILE, metadata={"format": "pt"})
    if folder.is_dir():
        shutil.rmtree(folder)
    partial_folder.rename(folder)
