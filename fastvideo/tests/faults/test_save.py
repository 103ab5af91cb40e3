"""A save that is cut off at any of its calls: what was there before is still there, or the new one is whole."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.engine.checkpoint.manifest import checkpoints_in
from fastvideo.distillation.engine.checkpoint.restore import newest
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.errors import RunError, UserError
from fastvideo.tests.distillation.resuming import STEPS, toy_run
from fastvideo.tests.faults.disk import Platter, faulty, interposed, kill, refuse
from fastvideo.tests.faults.saving import (
    NEW,
    OLD,
    Before,
    before_a_save,
    calls_of_a_save,
    check_newest,
    cut_off,
    faults_at,
    hook_of,
    save,
)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    return before_a_save(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def copies(before: Before, tmp_path: Path) -> Callable[[], Path]:
    """Fresh copies of the folder with the older checkpoint."""
    numbers = itertools.count()

    def copy() -> Path:
        target = tmp_path / f"copy-{next(numbers)}"
        shutil.copytree(before.folder, target)
        return target

    return copy


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["every third", "every"])
def test_a_kill_at_any_call_of_a_save_leaves_a_loadable_newest_checkpoint(
    stride: int, before: Before, copies: Callable[[], Path]
) -> None:
    """Before a call, and half way through a write (after any other call is before the next one)."""
    calls = calls_of_a_save(before.run, copies())
    assert {"open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir"} <= set(calls)
    steps = []
    for number, name in list(enumerate(calls))[::stride]:
        for fault in faults_at(name):
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
    with pytest.raises(UserError, match="no intact checkpoint"):
        newest(left / "checkpoints", Processes(), print)


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoint is the newest is a matter of steps and not of times."""
    clock = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    toy_run("dmd2", tmp_path, every=1, keep=2).train()
    names = [path.name for path in checkpoints_in(tmp_path / "checkpoints")]
    assert names == [f"step-{STEPS - 1}", f"step-{STEPS}"]
    found = newest(tmp_path / "checkpoints", Processes(), print)
    assert found is not None
    assert found.name == f"step-{STEPS}"
