"""Resuming from a checkpoint: the newest intact one, or one given by its path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fastvideo.distillation.engine.checkpoint.checkpoint import INDEX, SHARED, Parts
from fastvideo.distillation.engine.checkpoint.manifest import (
    MANIFEST,
    PREFIX,
    DamagedError,
    Manifest,
    checkpoints_in,
    complete_checkpoints,
    step_of,
)
from fastvideo.distillation.engine.checkpoint.state import EMA, JOINT, NETWORK, RoleState, join_state
from fastvideo.distillation.engine.checkpoint.storage import Stored, read_index, read_into
from fastvideo.distillation.engine.optional.mirror import checkpoints_at, fetch, fetch_newest
from fastvideo.distillation.engine.parallel.collective import Agreement
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.types import UserError
from fastvideo.storage import Remote

T = TypeVar("T")


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a run resumes from; ``notes`` list what is not bit-exact, ``moved`` the renamed later ones."""

    folder: Path
    step: int
    roles: tuple[str, ...]
    notes: tuple[str, ...]
    moved: tuple[str, ...] = ()


def newest(folder: Path, processes: Processes, say: Callable[[str], None], mirror: str | None = None) -> Path | None:
    """Find the newest intact checkpoint of a run, the same on all processes; skipped ones are logged.

    ``None`` if no save was ever finished: the run stopped before its first checkpoint.

    Args:
        folder: of the checkpoints.
        mirror: URL with copies of them, from which a newer one is downloaded.

    Raises:
        UserError: if every complete one is damaged, or the mirror cannot be read.
        RunError: if the mirror cannot be reached.
    """
    skipped: list[str] = []

    def pass_over(line: str) -> None:
        skipped.append(line)
        say(f"passed over {line}")

    complete = Agreement().from_main(bool(complete_checkpoints(folder)))
    found = _newest_here(folder, processes, pass_over)
    if mirror:
        found = _newer_there(mirror, folder, found, pass_over) or found
    if found is None and complete:
        listed = "".join(f"\n  {line}" for line in skipped)
        raise UserError(f"--resume: no intact checkpoint in {folder}{listed}")
    return found


def _newest_here(folder: Path, processes: Processes, pass_over: Callable[[str], None]) -> Path | None:
    """Newest intact checkpoint in a folder."""
    for name in Agreement().from_main([path.name for path in reversed(checkpoints_in(folder))]):
        problem = damage(folder / name, processes)
        if problem is None:
            return folder / name
        pass_over(f"{folder / name}: {problem}")
    return None


def _newer_there(mirror: str, folder: Path, here: Path | None, pass_over: Callable[[str], None]) -> Path | None:
    """Download the newest intact checkpoint at a mirror, if it is later than the one ``here``."""
    after = None if here is None else step_of(here)
    step, skipped = Agreement().on_main(lambda: fetch_newest(checkpoints_at(mirror), folder, after))
    for line in skipped:
        pass_over(line)
    return None if step is None else folder / f"{PREFIX}{step}"


def fetched(source: Remote, folder: Path, say: Callable[[str], None]) -> Path:
    """Download a checkpoint, or the newest of a run, that was given by its URL.

    Raises:
        UserError: if there is none, it is damaged, or cannot be read.
        RunError: if it cannot be reached.
    """
    step, skipped = Agreement().on_main(lambda: _fetch(source, folder))
    for line in skipped:
        say(f"passed over {line}")
    return folder / f"{PREFIX}{step}"


def _fetch(source: Remote, folder: Path) -> tuple[int, list[str]]:
    """Step of the downloaded checkpoint, and the damaged later ones."""
    step = step_of(Path(source.name))
    try:
        if step is not None:
            fetch(source.parent, step, folder)
            return step, []
    except DamagedError as error:
        raise UserError(f"checkpoint {source} cannot be used: {error}") from error
    skipped: list[str] = []
    for root in (source, checkpoints_at(source.url)):
        found, damaged = fetch_newest(root, folder)
        skipped += damaged
        if found is not None:
            return found, skipped
    listed = "".join(f"\n  {line}" for line in skipped)
    raise UserError(f"--resume-from: no intact checkpoint at {source}{listed}")


def check_intact(folder: Path, processes: Processes) -> None:
    """Verify a checkpoint that was given by its path.

    Raises:
        UserError: with the reason, if it is damaged.
    """
    if problem := damage(folder, processes):
        raise UserError(f"checkpoint {folder} cannot be used: {problem}")


def damage(folder: Path, processes: Processes) -> str | None:
    """Damage of a checkpoint, the same text on all processes; each verifies a part of its files."""
    problem = ""
    try:
        Manifest.read(folder).check_files(folder, processes.rank, processes.world_size)
    except DamagedError as error:
        problem = _no_checkpoint(folder) or str(error)
    found = dict.fromkeys(filter(None, Agreement().from_all(problem)))
    return "; ".join(found) or None


def _no_checkpoint(folder: Path) -> str | None:
    """Reason why a path names no checkpoint at all, with those near it."""
    inside = _names(folder / "checkpoints") or _names(folder)
    if inside:
        return f"it is a folder of checkpoints ({inside}): name one of them, or take the newest of a run with --resume"
    if not folder.exists():
        beside = _names(folder.parent)
        return "it does not exist" + (f"; there are {beside}" if beside else "")
    return None if PREFIX in folder.name or (folder / MANIFEST).exists() else "it is no checkpoint, and holds none"


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in complete_checkpoints(folder))


def restore(folder: Path, parts: Parts, processes: Processes) -> ResumePoint:
    """Load an intact checkpoint into the parts; sharding and number of processes may differ.

    Raises:
        UserError: if it holds other roles, or weights that do not fit.
    """
    manifest = Manifest.read(folder)
    if set(manifest.roles) != set(parts.roles):
        raise UserError(
            f"checkpoint {folder} holds the roles {', '.join(manifest.roles)}; this run trains {', '.join(parts.roles)}"
        )
    layout = (processes.world_size, processes.context, processes.device.type)
    foreign = (manifest.world_size, manifest.context, manifest.device) != layout
    source = f"process-{0 if foreign else processes.rank}"
    index = read_index(folder / INDEX)
    _check_fit(folder, parts, index)
    targets: dict[str, Tensor] = {}
    for name, part in parts.everywhere.items():
        stored = under(index, f"{name}{JOINT}")
        wanted = part.targets(stored) if isinstance(part, RoleState) else _empty(stored)
        targets |= {f"{name}{JOINT}{key}": tensor for key, tensor in wanted.items()}
    targets |= {f"{source}{JOINT}{key}": t for key, t in _empty(under(index, f"{source}{JOINT}")).items()}
    read_into(targets, folder, index)
    shared = json.loads((folder / SHARED).read_text(encoding="utf-8"))
    for name, part in parts.everywhere.items():
        part.load_state_dict(join_state(under(targets, f"{name}{JOINT}"), shared[name]))
    own = json.loads((folder / f"{source}.json").read_text(encoding="utf-8"))
    states = {name: join_state(under(targets, f"{source}{JOINT}{name}{JOINT}"), own[name]) for name in parts.own}
    return ResumePoint(folder, manifest.step, manifest.roles, _load_own(parts, states, manifest, processes, foreign))


def _load_own(
    parts: Parts, states: Mapping[str, Any], manifest: Manifest, processes: Processes, foreign: bool
) -> tuple[str, ...]:
    if not foreign:
        for name, part in parts.own.items():
            part.load_state_dict(states[name])
        return ()
    notes = [part.load_foreign_state(states[name], manifest.step) for name, part in parts.own.items()]
    before = _layout(manifest.world_size, manifest.context, manifest.device)
    now = _layout(processes.world_size, processes.context, processes.device.type)
    return (f"saved by {before}, resumed by {now}: weights, optimizers and averages are exact", *notes)


def _layout(world_size: int, context: int, device: str) -> str:
    return f"{world_size} x {device}" + (f" ({context} per sample)" if context > 1 else "")


def _check_fit(folder: Path, parts: Parts, index: Mapping[str, Stored]) -> None:
    for name, part in parts.roles.items():
        problems = part.problems(under(index, f"{name}{JOINT}"))
        if problems:
            raise UserError(f"checkpoint {folder}: the weights of role {name!r} do not fit: {'; '.join(problems)}")


def _empty(index: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: stored.empty() for name, stored in index.items()}


def under(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def set_aside(checkpoint: Path, processes: Processes) -> list[str]:
    """Rename checkpoints later than the one that a run resumes from; returns a message for each."""
    folder, moved = checkpoint.parent, list[str]()
    for path in checkpoints_in(folder) if processes.is_main else ():
        if (step_of(path) or 0) > (step_of(checkpoint) or 0):
            target = _free_name(folder / f"abandoned-{path.name}")
            path.rename(target)
            moved.append(f"{path.name} is later than the one asked for: kept as {target.name}")
    Agreement().wait()
    return moved


def _free_name(path: Path) -> Path:
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in range(10_000))
    return next(name for name in names if not name.exists())


def role_parts(checkpoint: Path, role: str) -> set[str]:
    """Parts of a role's state (``network``, ``ema``, ``optimizer``) that a checkpoint holds."""
    return {name.split(JOINT)[0] for name in under(read_index(checkpoint / INDEX), f"{role}{JOINT}")}


def role_weights(checkpoint: Path, role: str, part: str) -> dict[str, Tensor]:
    """Read the whole tensors of one part of a role's state by name, on the CPU, and nothing else."""
    assert part in (NETWORK, EMA)
    index, prefix = read_index(checkpoint / INDEX), JOINT.join((role, part, ""))
    wanted = {name: stored.empty() for name, stored in index.items() if name.startswith(prefix)}
    read_into(wanted, checkpoint, index, alone=True)
    return under(wanted, prefix)
