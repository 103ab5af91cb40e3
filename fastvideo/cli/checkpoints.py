"""``fastvideo checkpoints``: list and verify the checkpoints of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastvideo.cli.arguments import Switch, parse
from fastvideo.cli.console import console
from fastvideo.errors import UserError
from fastvideo.files import readable_size

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CheckpointsArguments:
    """List the checkpoints of a run: step, complete or not, size, roles, processes, config, age."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    verify: Switch = False
    """Read every byte and compare it with its hash; exit code 1 if one differs."""


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 0, or 1 if ``--verify`` found damage."""
    arguments = parse(CheckpointsArguments, argv, "checkpoints")

    table, damaged = checkpoint_table(arguments.run, verify=arguments.verify, now=time.time())
    console().print(table)
    return 1 if damaged and arguments.verify else 0


def checkpoint_table(run: Path, *, verify: bool, now: float) -> tuple[Table, int]:
    """Make one row per checkpoint, newest first, and count the damaged ones.

    Raises:
        UserError: if the folder holds none.
    """
    from rich.table import Table

    from fastvideo.distillation.engine.checkpoint.manifest import (
        DamagedError,
        Manifest,
        checkpoints_in,
        step_of,
        verified,
    )

    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = checkpoints_in(folder)
    if not found:
        raise UserError(f"{run} holds no checkpoints (step-N); a run saves them with checkpoint.every")
    columns = ("step", "verified" if verify else "complete", "size", "roles", "processes", "config", "age")
    table, damaged = Table(*columns, title=str(folder)), 0
    for path in reversed(found):
        try:
            manifest = verified(path) if verify else Manifest.read(path)
        except DamagedError as error:
            damaged += 1
            table.add_row(str(step_of(path)), f"[red]no[/red]: {error}", "", "", "", "", "")
            continue
        processes = f"{manifest.world_size} x {manifest.device}"
        row = (str(manifest.step), "yes", readable_size(manifest.size), ", ".join(manifest.roles), processes)
        table.add_row(*row, manifest.config_hash[:12], readable_age(now - manifest.saved_at))
    return table, damaged


def readable_age(seconds: float) -> str:
    """Time span in its largest unit; never negative, even if the clock went backwards."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
