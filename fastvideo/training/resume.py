"""Going on: which checkpoint, under which config, and what a person is told about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastvideo.data.order import SampleStream
from fastvideo.distillation.builder import Config
from fastvideo.distillation.config.base import RESUMABLE, Section
from fastvideo.distillation.config.reading import read_yaml
from fastvideo.distillation.engine.checkpoint.checkpoint import CONFIG, CheckpointHook, Parts, RunFacts, SaveOptions
from fastvideo.distillation.engine.checkpoint.manifest import checkpoints_in, step_of
from fastvideo.distillation.engine.checkpoint.restore import Restored, check_intact, newest, restore
from fastvideo.distillation.engine.checkpoint.state import RoleState, Stateful
from fastvideo.distillation.engine.parallel.distributed import Processes, barrier
from fastvideo.distillation.engine.validation import ValidationHook
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment

CHECKPOINTS = "checkpoints"


def checkpoint_folder(config: Config) -> Path:
    """Where a run's checkpoints are."""
    return Path(config.output) / CHECKPOINTS


def checkpoint_hook(config: Config, parts: Parts, processes: Processes) -> CheckpointHook:
    """What saves this run."""
    options = config.checkpoint.model_dump() | {"last_step": config.trainer.max_steps}
    return CheckpointHook(checkpoint_folder(config), parts, processes, SaveOptions(**options), run_facts(config))


def run_parts(trainer: DistillTrainer, data: SampleStream, validation: ValidationHook | None = None) -> Parts:
    """Everything of a run that survives."""
    method = trainer.method
    roles = {handle.name: RoleState(handle) for handle in method.bundle if handle.trainable}
    shared: dict[str, Stateful] = {"method": method}
    if validation is not None:
        shared["validation"] = validation
    return Parts(roles, shared, {"trainer": trainer, "rng": method.rng, "data": data})


def run_facts(config: Config) -> RunFacts:
    """What a checkpoint says about its run."""
    values = config.model_dump(mode="json")
    binding = {key: value for key, value in flat(values).items() if not is_resumable(type(config), key)}
    digest = hashlib.sha256(json.dumps(binding, sort_keys=True).encode()).hexdigest()
    return RunFacts(yaml.safe_dump(values, sort_keys=False), digest, environment())


def find_checkpoint(
    config: Config, processes: Processes, wanted: Path | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from: the one that was asked for, else the newest intact one of the output folder.

    ``None`` for a run that was cut off before its first checkpoint was complete: it starts anew.

    Raises:
        UserError: if it is damaged, or its config is one of another run.
    """
    if wanted is not None:
        check_intact(wanted, processes)
    found = wanted or newest(checkpoint_folder(config), processes, say)
    saved = found or Path(config.output)
    for line in check_config(config, saved) if (saved / CONFIG).is_file() else []:
        say(f"changed since {saved.name}: {line}")
    if found is None:
        say(f"{checkpoint_folder(config)} holds no complete checkpoint: starting at step 0")
    return found


def check_config(config: Config, checkpoint: Path) -> list[str]:
    """The differences to a checkpoint's config that may be, for the user.

    Raises:
        UserError: listing those that would change the run silently.
    """
    before, now = flat(read_yaml(checkpoint / CONFIG)), flat(config.model_dump(mode="json"))
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    lines = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys}
    started = {f"roles.{name}.init_from" for name, role in config.roles.items() if role.trainable}
    refused = [line for key, line in lines.items() if not is_resumable(type(config), key) and key not in started]
    if refused:
        raise UserError(
            f"--resume: this config is not that of {checkpoint}, and would change the run silently:\n  "
            + "\n  ".join(refused)
        )
    return list(lines.values())


def already_started(config: Config) -> Config:
    """The config for a run that goes on: what its trained roles started from is not read again."""
    roles = {
        name: role.model_copy(update={"init_from": None}) if role.trainable else role
        for name, role in config.roles.items()
    }
    return config.model_copy(update={"roles": roles})


def is_resumable(schema: type[Section], key: str) -> bool:
    """True if the field at a dotted key, or a section around it, is marked as one that a resumed run may change."""
    name, _, rest = key.partition(".")
    field = schema.model_fields.get(name)
    if field is None:
        return False
    inner = field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else None
    return RESUMABLE in field.metadata or bool(inner and rest and is_resumable(inner, rest))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def go_on(config: Config, checkpoint: Path | None, parts: Parts, data: SampleStream, processes: Processes) -> list[str]:
    """Restore a run from an intact checkpoint, if there is one; what was restored, for the user.

    Raises:
        UserError: if the checkpoint's roles or weights do not fit.
    """
    if checkpoint is None:
        return []
    restored = restore(checkpoint, parts, processes)
    inexact = [f"not bit-exact: {note}" for note in restored.notes]
    return [_summary(restored, data), *inexact, *set_aside(config, checkpoint, processes)]


def _summary(restored: Restored, data: SampleStream) -> str:
    roles = ", ".join(restored.roles)
    position = f"epoch {data.epoch}, batch {data.round} of {data.rounds}"
    return f"resumed at step {restored.step} from {restored.folder}: roles {roles}; data at {position}; random streams"


def set_aside(config: Config, checkpoint: Path, processes: Processes) -> list[str]:
    """Take later checkpoints out of the way of a run that goes on from an earlier one; nothing is deleted."""
    folder, moved = checkpoint_folder(config), []
    if processes.is_main and checkpoint.resolve().parent == folder.resolve():
        for path in checkpoints_in(folder):
            if (step_of(path) or 0) > (step_of(checkpoint) or 0):
                target = _free_name(folder / f"abandoned-{path.name}")
                path.rename(target)
                moved.append(f"{path.name} is later than the one asked for: kept as {target.name}")
    barrier()
    return moved


def _free_name(path: Path) -> Path:
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in range(10_000))
    return next(name for name in names if not name.exists())
