"""One run: folder, data, trainer with its hooks, result."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastvideo.data.order import SampleStream, Shard, read_prompts
from fastvideo.distillation.builder import Adapter, Config, Method, build_adapter, build_method, load_method
from fastvideo.distillation.engine.checkpoint import CheckpointHook, complete_checkpoints
from fastvideo.distillation.engine.distributed import Processes, barrier, start_processes, stop_processes
from fastvideo.distillation.engine.ema import EMAHook
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.validation import ValidationHook, ValidationSinks
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import generate
from fastvideo.distillation.trainer import DistillTrainer, Hook, LoopOptions
from fastvideo.distillation.types import UserError

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
    check_output(output, resume=resume, overwrite=overwrite)
    barrier()
    adapter = build_adapter(config, processes)
    method = build_method(config, adapter, processes)
    data = _build_data_once(config, adapter, processes)
    if processes.is_main:
        prepare_output(config, output, overwrite=overwrite)
    barrier()
    tracker = Tracker(output, enabled=processes.is_main)
    trainer = build_trainer(config, adapter, method, tracker, processes)
    checkpoint = _checkpoint_hook(config, trainer, data, processes)
    if resume:
        tracker.say(f"resumed at step {checkpoint.restore()} from {checkpoint.folder}")
    trainer.hooks = (*trainer.hooks, checkpoint)
    trainer.run(data)
    if processes.is_main:
        save_result(config, adapter, method, output / "student")
        tracker.say(f"saved {output / 'student'}")
    barrier()
    return output / "student"


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless told what to do with it.

    Raises:
        UserError: if it is not empty and neither flag is given, both are, or there is nothing to resume.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and not complete_checkpoints(output / "checkpoints"):
        raise UserError(f"--resume: no complete checkpoint in {output / 'checkpoints'}")
    if output.is_dir() and any(output.iterdir()) and not (resume or overwrite):
        raise UserError(
            f"output folder {output} holds another run: continue it with --resume, delete it with --overwrite, "
            f"or choose another with --output"
        )
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / "config.yaml").is_file():
        raise UserError(f"--overwrite: {output} was not made by a run (it has no config.yaml); delete it yourself")


def prepare_output(config: Config, output: Path, *, overwrite: bool) -> None:
    """The folder with what is needed to run again: resolved config, package versions, code revision."""
    if overwrite:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, str]:
    """Versions and revision behind a run."""
    packages = ("torch", "diffusers", "transformers", "numpy", "safetensors", "pydantic")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "revision": revision or "not a git checkout",
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _build_data_once(config: Config, adapter: Adapter, processes: Processes) -> SampleStream:
    """The data, with the main process first: what it computes and caches, the others only read."""
    if processes.is_main:
        data = build_data(config, adapter, processes)
    barrier()
    return data if processes.is_main else build_data(config, adapter, processes)


def build_data(config: Config, adapter: Adapter, processes: Processes) -> SampleStream:
    """The stream of the configured source; latents are computed (once) only for a method that trains on them.

    Raises:
        UserError: if the method needs latents and the source has prompts alone.
    """
    options = config.data
    shard = Shard(options.batch_size, processes.rank, processes.world_size)
    uses_latents = load_method(config.distill_method).uses_latents(config.method)
    if options.source == "prompts":
        if uses_latents:
            raise UserError(
                f"data: method {config.distill_method!r} (as configured) trains on videos, `source: prompts` has none"
            )
        return SampleStream(read_prompts(str(options.path)), None, config.seed, shard)
    if not uses_latents:
        from fastvideo.tiny.world import TinyWorld

        return SampleStream(TinyWorld("train").sample_captions(options.size, config.seed), None, config.seed, shard)
    from fastvideo.tiny.latents import cached_latents

    encoded = cached_latents(adapter, options.size, config.seed, Path(options.cache))
    return SampleStream(encoded.captions, encoded.latents, config.seed, shard)


def build_trainer(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> DistillTrainer:
    """The trainer with its averaging and validation hooks."""
    student = method.bundle["student"]
    hooks: list[Hook] = []
    if config.ema.enabled:
        hooks.append(EMAHook(student, config.ema.decay, config.ema.start_step))
    if config.validation.every and processes.is_main:
        hooks.append(_validation_hook(config, adapter, method, tracker))
    names = ("max_steps", "grad_accumulation", "max_grad_norm", "log_every")
    options = LoopOptions(**config.trainer.model_dump(include=set(names)))
    return DistillTrainer(method, adapter.prepare, options, tracker, hooks)


def _checkpoint_hook(
    config: Config, trainer: DistillTrainer, data: SampleStream, processes: Processes
) -> CheckpointHook:
    parts: dict[str, Any] = {handle.name: handle for handle in trainer.method.bundle if handle.trainable}
    parts |= {"method": trainer.method, "trainer": trainer, "rng": trainer.method.rng, "data": data}
    options = config.checkpoint
    return CheckpointHook(Path(config.output) / "checkpoints", parts, processes, every=options.every, keep=options.keep)


def _validation_hook(config: Config, adapter: Adapter, method: Method, tracker: Tracker) -> ValidationHook:
    from fastvideo.data.video_io import write_video

    options = config.validation
    prompts: list[str] = list(options.prompts)
    score = None
    if options.world_prompts:
        from fastvideo.evaluation.judge import Judge

        judge = Judge(options.world_prompts, options.seed, reference=VALIDATION_REFERENCE)
        prompts, score = list(judge.prompts), judge.score
    condition = adapter.encode_prompts(prompts)

    def sample(network: nn.Module) -> Tensor:
        generator = seeded(options.seed)
        draw = partial(normal, generator=generator)
        noise = draw((len(prompts), *adapter.latent_shape)).to(adapter.device)
        velocity = partial(adapter.velocity, network, condition=condition)
        return adapter.decode(
            generate(
                method.sampler, velocity, noise, method.ladder.times, lambda x: draw(tuple(x.shape)).to(adapter.device)
            )
        )

    sinks = ValidationSinks(tracker.log, partial(write_video, fps=options.fps, scale=4), score)
    return ValidationHook(
        method.bundle["student"], sample, sinks, Path(config.output) / "validation", every=options.every
    )


def save_result(config: Config, adapter: Adapter, method: Method, folder: Path) -> None:
    """The student as a model folder: averaged weights if there are any, and the recipe that samples from it."""
    student = method.bundle["student"]
    recipe = {
        "distill_model": config.distill_model,
        "method": config.distill_method,
        "model": config.model.model_dump(mode="json"),
        "sampler": method.sampler,
        "weights": "live" if student.ema is None else "ema",
        "steps": config.trainer.max_steps,
    }
    if method.sampler == "renoise":  # a teacher takes any number of steps and any guidance
        recipe |= {"ladder": list(method.ladder.times), "guidance": 1.0}
    adapter.save_pipeline(folder, student.ema if student.ema is not None else student.network, recipe)
