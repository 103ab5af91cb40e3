"""A save that meets a fault at one of its calls, and what must be left of the checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.distillation.engine.checkpoint.restore import newest
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.tests.distillation.resuming import ToyRun, toy_run
from fastvideo.tests.faults.disk import Fault, faulty, interposed, kill, kill_half_way
from fastvideo.tests.launch import in_child

OLD, NEW = 3, 6


@dataclass(frozen=True)
class Before:
    """A run at its last step, a folder that holds an older checkpoint, and what both checkpoints must hold."""

    run: ToyRun
    folder: Path
    contents: Mapping[int, Mapping[str, bytes]]


def before_a_save(folder: Path) -> Before:
    """The run, trained and saved under the folder."""
    run = toy_run("dmd2", folder / "run", every=OLD, keep=2).train()
    contents = {step: state_files(run.folder / "checkpoints" / f"step-{step}") for step in (OLD, NEW)}
    run.restore(NEW, run.folder)  # the end of the run has closed the metrics window that its checkpoint holds
    shutil.rmtree(run.folder / "checkpoints" / f"step-{NEW}")
    hook_of(run).options = hook_of(run).options.model_copy(update={"keep": 1})
    return Before(run, run.folder, contents)


def faults_at(name: str) -> tuple[Fault, ...]:
    """How a save is cut off at a call: before it, and half way through a write (else it is before the next call)."""
    return (kill, kill_half_way) if name == "write" else (kill,)


def hook_of(run: ToyRun) -> Any:
    """The hook that saves a run."""
    return run.trainer.hooks[0]


def state_files(checkpoint: Path) -> dict[str, bytes]:
    """All that a checkpoint says about the state, byte for byte; the manifest says when it was saved, too."""
    return {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "manifest.json"}


def save(run: ToyRun, folder: Path) -> None:
    """Save a run's state into a folder, and wait for it."""
    hook_of(run).folder = folder / "checkpoints"
    hook_of(run).save(NEW)
    hook_of(run).wait()


def calls_of_a_save(run: ToyRun, folder: Path) -> list[str]:
    """The calls that a save makes, in order."""
    names: list[str] = []
    with interposed(lambda number, name, arguments: names.append(name)):
        save(run, folder)
    return names


def cut_off(run: ToyRun, folder: Path, number: int, fault: Fault) -> int:
    """Save in a child that meets a fault at one call; how it ended."""

    def work() -> None:
        with faulty(number, fault):
            save(run, folder)

    return in_child(work)


def check_newest(before: Before, folder: Path, at: str) -> int:
    """Check that the newest intact checkpoint is the older or the new one, as it must be; its step."""
    found = newest(folder / "checkpoints", Processes(), print)
    assert found is not None, f"no loadable checkpoint is left after {at}"
    step = int(found.name.removeprefix("step-"))
    assert state_files(found) == before.contents[step], f"another state after {at}"
    return step
