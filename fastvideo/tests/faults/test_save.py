"""A save that is cut off at any of its calls: what was there before is still there, or the new one is whole."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.engine.manifest import checkpoints_in, newest_intact
from fastvideo.errors import RunError
from fastvideo.tests.distillation.resuming import STEPS, ToyRun, toy_run
from fastvideo.tests.faults.disk import (
    Fault,
    Platter,
    faulty,
    in_child,
    interposed,
    kill,
    kill_half_way,
    refuse,
)

OLD, NEW = 3, 6


@dataclass(frozen=True)
class Before:
    """A run at its last step, a folder that holds an older checkpoint, and what both checkpoints must hold."""

    run: ToyRun
    folder: Path
    contents: Mapping[int, Mapping[str, bytes]]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    folder = tmp_path_factory.mktemp("faults")
    run = toy_run("dmd2", folder / "run", every=OLD, keep=2).train()
    contents = {step: state_files(run.folder / "checkpoints" / f"step-{step}") for step in (OLD, NEW)}
    shutil.rmtree(run.folder / "checkpoints" / f"step-{NEW}")
    hook_of(run).options = replace(hook_of(run).options, keep=1)
    return Before(run, run.folder, contents)


@pytest.fixture
def copies(before: Before, tmp_path: Path) -> Callable[[], Path]:
    """Fresh copies of the folder with the older checkpoint."""
    numbers = itertools.count()

    def copy() -> Path:
        target = tmp_path / f"copy-{next(numbers)}"
        shutil.copytree(before.folder, target)
        return target

    return copy


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
    found = newest_intact(checkpoints_in(folder / "checkpoints"), [])
    assert found is not None, f"no loadable checkpoint is left after {at}"
    assert state_files(found[0]) == before.contents[found[1].step], f"another state after {at}"
    return found[1].step


def test_a_kill_at_any_call_of_a_save_leaves_a_loadable_newest_checkpoint(
    before: Before, copies: Callable[[], Path]
) -> None:
    """Before every call, and half way through every write (after any other call is before the next one)."""
    calls = calls_of_a_save(before.run, copies())
    assert {"open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir"} <= set(calls)
    steps = []
    for number, name in enumerate(calls):
        for fault in (kill, kill_half_way) if name == "write" else (kill,):
            folder = copies()
            assert cut_off(before.run, folder, number, fault) == signal.SIGKILL
            steps.append(check_newest(before, folder, f"a kill at call {number} ({name})"))
            if number % 10 == 0:  # what was cut off is no obstacle to the next save
                save(before.run, folder)
                assert [path.name for path in checkpoints_in(folder / "checkpoints")] == [f"step-{NEW}"]
    assert steps == sorted(steps), "the new checkpoint counts from one call on, and goes on to count"
    assert set(steps) == {OLD, NEW}


def test_a_kill_while_a_thread_saves_leaves_a_loadable_newest_checkpoint(
    before: Before, copies: Callable[[], Path], tmp_path: Path
) -> None:
    calls = calls_of_a_save(before.run, copies())
    save(before.run, complete := copies())
    for number in range(0, len(calls), 3):
        # The thread of a forked process does not come with it: every child starts its own.
        run = toy_run("dmd2", tmp_path / "own", every=OLD, keep=1, asynchronous=True).restore(NEW, complete)
        folder = copies()
        assert cut_off(run, folder, number, kill) == signal.SIGKILL
        check_newest(before, folder, f"a kill at call {number} ({calls[number]})")


@pytest.mark.parametrize("entries_at_once", [False, True], ids=["names lost", "names kept"])
def test_a_power_cut_at_any_call_of_a_save_leaves_a_loadable_newest_checkpoint(
    entries_at_once: bool, before: Before, copies: Callable[[], Path], tmp_path: Path
) -> None:
    """What was not flushed is gone: contents always, names either always or never."""
    folder = copies()
    disk = Platter(folder, entries_at_once)
    disk.load()
    steps = []

    def cut(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        target = tmp_path / f"cut-{number}"
        target.mkdir()
        disk.materialise(target)
        steps.append(check_newest(before, target, f"a power cut at call {number} ({name})"))

    with interposed(cut, disk.after):
        save(before.run, folder)
    assert set(steps) == {OLD, NEW}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["disk full", "read-only"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in a thread"])
def test_a_disk_that_refuses_is_one_message_and_loses_nothing(
    code: int, asynchronous: bool, before: Before, copies: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copies()
    run = toy_run("dmd2", tmp_path / "run", every=OLD, keep=1, asynchronous=asynchronous).restore(OLD, folder)
    hook_of(run).folder = folder / "checkpoints"

    def train() -> None:
        run.train()
        hook_of(run).wait()

    with faulty(12, refuse(code), ever_after=True), pytest.raises(RunError, match=os.strerror(code)):
        train()
    assert check_newest(before, folder, "a refused save") == OLD
    again = toy_run("dmd2", tmp_path / "again", every=OLD, keep=1).restore(OLD, folder)
    hook_of(again).folder = folder / "checkpoints"
    again.train()
    assert check_newest(before, folder, "room was made") == NEW


def test_a_save_flushes_each_file_and_folder_before_its_manifest_has_a_name(
    before: Before, copies: Callable[[], Path]
) -> None:
    """The checker above can see: without the flushes, a power cut leaves nothing."""
    folder = copies()
    disk = Platter(folder, entries_at_once=True)
    disk.load()
    forgetful = lambda name, arguments, result: name == "fsync" or disk.after(name, arguments, result)  # noqa: E731
    with interposed(lambda number, name, arguments: None, forgetful):
        save(before.run, folder)
    left = folder.with_name("left")
    left.mkdir()
    disk.materialise(left)
    assert newest_intact(checkpoints_in(left / "checkpoints"), []) is None


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoint is the newest is a matter of steps and not of times."""
    clock = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    toy_run("dmd2", tmp_path, every=1, keep=2).train()
    names = [path.name for path in checkpoints_in(tmp_path / "checkpoints")]
    assert names == [f"step-{STEPS - 1}", f"step-{STEPS}"]
    found = newest_intact(checkpoints_in(tmp_path / "checkpoints"), [])
    assert found is not None
    assert found[1].step == STEPS
