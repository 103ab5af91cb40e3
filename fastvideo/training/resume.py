"""Resuming: finding the checkpoint, comparing configs, and messages about both."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

from fastvideo.data.order import SampleStream
from fastvideo.distillation.adapters.diffusers.folder import RETIRED
from fastvideo.distillation.builder import Config
from fastvideo.distillation.config.base import RESUMABLE, Section
from fastvideo.distillation.config.reading import read_yaml
from fastvideo.distillation.engine.saving import ResumePoint, RunFacts
from fastvideo.distillation.engine.session import Session
from fastvideo.distillation.engine.validation import ValidationHook
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment
from fastvideo.inference.loading import RECIPE
from fastvideo.storage import Place
from fastvideo.wording import see

CHECKPOINTS, CONFIG, STUDENT = "checkpoints", "config.yaml", "student"


def checkpoint_folder(config: Config) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.output) / CHECKPOINTS


@runtime_checkable
class KeepsOwnParts(Protocol):
    """Method with state that differs between processes."""

    @property
    def own_parts(self) -> Mapping[str, Any]:
        """That state by name: parts with ``state_dict``, ``load_state_dict`` and ``load_foreign_state``, as
        :class:`~fastvideo.distillation.rng.RandomStreams` has them."""
        ...


def survivors(
    trainer: DistillTrainer, data: SampleStream, validation: ValidationHook | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a run beside its roles: those that all processes hold alike, and each process's own."""
    shared = {"method": trainer.method} | ({} if validation is None else {"validation": validation})
    own = {"trainer": trainer, "rng": trainer.method.rng, "data": data}
    parts = trainer.method.own_parts if isinstance(trainer.method, KeepsOwnParts) else {}
    return shared, own | dict(parts)


def run_facts(config: Config) -> RunFacts:
    """Facts for a checkpoint: the config as YAML, the hash of the part that a resumed run must keep, versions."""
    values = config.model_dump(mode="json")
    binding = {key: value for key, value in flat(values).items() if not is_resumable(type(config), key)}
    digest = hashlib.sha256(json.dumps(binding, sort_keys=True).encode()).hexdigest()
    return RunFacts(yaml.safe_dump(values, sort_keys=False), digest, environment())


def find_checkpoint(config: Config, session: Session, wanted: Place | None) -> Path | None:
    """Find the checkpoint to resume from: ``wanted``, else the newest intact one of the output folder.

    ``None`` for a run that stopped before its first checkpoint was complete: it starts anew.

    Raises:
        UserError: if it is damaged, its config is another run's, the newest is older than the finished student, or it
            has more steps than the run is to have.
    """
    say = session.tracker.say
    found = session.find_checkpoint(checkpoint_folder(config), wanted, config.checkpoint.mirror)
    saved = found or Path(config.output)
    for line in check_config(config, saved) if (saved / CONFIG).is_file() else []:
        say(f"changed since {saved.name}: {line}")
    step = 0 if found is None else session.saved_step(found)
    if wanted is None:
        _check_student(config, found, step)
    if step > config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps is {config.trainer.max_steps}, and {found} has {step} steps: give --trainer.max-steps "
            f"{step} or more, or an earlier checkpoint with --resume-from"
        )
    if found is None:
        say(f"{checkpoint_folder(config)} holds no complete checkpoint: starting at step 0")
    return found


def _check_student(config: Config, found: Path | None, step: int) -> None:
    """Refuse to take steps again that the finished student has: it would be replaced at their end."""
    student = Path(config.output) / STUDENT
    file = student / RECIPE
    finished = json.loads(file.read_text(encoding="utf-8")).get("steps", 0) if file.is_file() else 0
    if finished <= step:
        return
    if found is None:
        newest, again = f"{checkpoint_folder(config)} holds no complete checkpoint", "start anew with --overwrite"
    else:
        newest = f"the newest intact checkpoint is {found}"
        again = f"go back with --resume-from {shlex.quote(str(found))}"
    raise UserError(
        f"--resume: {student} has finished {finished} steps, and {newest}: the steps since would be taken again, and "
        f"that student replaced. Go on from its weights in a new run with --init-student-from "
        f"{shlex.quote(str(student))} --output FOLDER, or {again}. With --checkpoint.every N a run saves its last "
        f"step too{see('nothing-is-left-to-train')}"
    )


def check_config(config: Config, checkpoint: Path) -> list[str]:
    """Allowed differences from a checkpoint's config, for the user.

    Raises:
        UserError: listing those that would change the run silently.
    """
    before, now = flat(read_yaml(checkpoint / CONFIG)), flat(config.model_dump(mode="json"))
    for key in RETIRED:
        before.pop(f"model.{key}", None)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    lines = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys}
    trained = [name for name, role in config.roles.items() if role.trainable]
    started = {f"roles.{name}.{key}" for name in trained for key in ("init_from", "lora.init_from")}
    refused = [line for key, line in lines.items() if not is_resumable(type(config), key) and key not in started]
    if refused:
        raise UserError(
            f"--resume: this config is not that of {checkpoint}, and would change the run silently:\n  "
            + "\n  ".join(refused)
            + f"\n {see('a-resumed-run-is-refused')}"
        )
    return list(lines.values())


def already_started(config: Config) -> Config:
    """The config of a resumed run: trained roles do not read their initial weights again."""
    roles = {name: role.without_start() if role.trainable else role for name, role in config.roles.items()}
    return config.model_copy(update={"roles": roles})


def is_resumable(schema: type[Section], key: str) -> bool:
    """True if a resumed run may change the field at a dotted key: it, or a section around it, is marked."""
    name, _, rest = key.partition(".")
    field = schema.model_fields.get(name)
    if field is None:
        return False
    inner = field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else None
    return RESUMABLE in field.metadata or bool(inner and rest and is_resumable(inner, rest))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested keys to dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def resumed(point: ResumePoint, data: SampleStream) -> list[str]:
    """Lines for the user about a resumed run."""
    roles = ", ".join(point.roles)
    position = f"epoch {data.epoch}, batch {data.round} of {data.rounds}"
    summary = f"resumed at step {point.step} from {point.folder}: roles {roles}; data at {position}"
    return [f"{summary}; random streams", *(f"not bit-exact: {note}" for note in point.notes), *point.moved]
