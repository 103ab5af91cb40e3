"""A toy run that can be saved, restored and compared, for the tests of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.config.averages import EMAConfig
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, Parts, RunFacts
from fastvideo.distillation.engine.checkpoint.restore import restore
from fastvideo.distillation.engine.checkpoint.state import split_state
from fastvideo.distillation.engine.ema import keep_averages
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.saving import Saving
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import attach_optimizer
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.tests.distillation.toys import LADDER, MEAN, STD, spy, toy_method, trajectory_extras
from fastvideo.tests.preparing import preparer
from fastvideo.training.resume import survivors

STEPS, LOG_EVERY, SAMPLES = 6, 4, 22
"""Metrics windows end inside the run and not at its end, and epochs inside accumulations."""


@dataclass
class ToyRun:
    """One run of a registered method on analytic roles, every trained role averaged."""

    trainer: DistillTrainer
    stream: SampleStream
    parts: Parts
    folder: Path

    def train(self) -> ToyRun:
        """To the last step."""
        self.trainer.run(self.stream)
        return self

    def restore(self, step: int, source: Path | None = None) -> ToyRun:
        """Go on from a checkpoint, of this folder or another run's."""
        restore((source or self.folder) / "checkpoints" / f"step-{step}", self.parts, Processes())
        return self

    def state(self) -> dict[str, Any]:
        """Everything that survives, flat, with the next batch."""
        parts = {**self.parts.everywhere, **self.parts.own}
        tensors, rest = split_state({name: part.state_dict() for name, part in parts.items()})
        batch = next(self.stream)
        assert batch.latents is not None
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        return {**kept, "next": batch.latents, "captions": batch.captions, "rest": json.loads(json.dumps(rest))}

    def logged(self, after: int = 0) -> list[dict[str, Any]]:
        """The metrics that were written for later steps, without the time they took."""
        file = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["step"] > after]


def toy_run(name: str, folder: Path, *, accumulation: int = 1, **save: Any) -> ToyRun:
    """A run of one method, from the start; with ``every`` and other options of saving it saves."""
    folder.mkdir(parents=True, exist_ok=True)
    method = toy_method(name, spy(), mean=-0.5, std=1.2)
    for role, options in method.optimizers(method.config).items():
        attach_optimizer(method.bundle[role], options.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 3}))
    generator = torch.Generator().manual_seed(5)
    latents = MEAN + STD * torch.randn((SAMPLES, 1, 1, 4, 4), generator=generator)
    walks = trajectory_extras(latents[:, None].expand(-1, len(LADDER), -1, -1, -1, -1))
    stream = SampleStream(MemorySource([str(i / 10) for i in range(SAMPLES)], latents, walks), 3, Shard(4))
    loop = TrainerConfig(max_steps=STEPS, grad_accumulation=accumulation, log_every=LOG_EVERY)
    ema = EMAConfig(roles=method.trainable_roles, decay=0.9, start_step=2)
    runtime = Runtime(method, loop, Tracker(folder), averages=keep_averages(method.bundle, ema))
    adapter = method.bundle["student"].adapter
    trainer = DistillTrainer(method, preparer(adapter), loop, runtime)  # type: ignore[attr-defined]
    parts = Saving(runtime).parts(*survivors(trainer, stream))
    if save:
        facts = RunFacts("seed: 3\n", "0" * 64, {"torch": torch.__version__})
        options = CheckpointConfig(**save)
        trainer.hooks = (CheckpointHook(folder / "checkpoints", parts, Processes(), options, trainer.over, facts),)
    return ToyRun(trainer, stream, parts, folder)


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two states, to the bit."""
    names = sorted(first.keys() ^ second.keys())
    for name in sorted(first.keys() & second.keys()):
        one, other = first[name], second[name]
        same = same_bits(one, other) if isinstance(one, Tensor) else one == other
        names += [] if same else [name]
    return names


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, NaN and the sign of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
