"""Child processes of the tests: commands, ranks with and without torchrun, forks, and process groups.

All that a process prints goes to one file, so that no full pipe holds it up while a test waits for another.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

TRAIN = (sys.executable, "-m", "fastvideo.training.distillation")
"""A training, without torchrun."""
PATIENCE = 300.0
"""Seconds that a child process may take: a hang is a failure, before the test's own limit (pyproject.toml) is one."""
COLLECTIVE = timedelta(seconds=30)
"""Longest wait of a collective: processes that run different forwards are a failure and not a hang."""


Work = Sequence[str] | Callable[[], Any]
"""A command, or what a forked process does."""


class Child:
    """One running process: a command, or a function of this process that is forked, which imports nothing again."""

    def __init__(self, work: Work, environment: Mapping[str, str] | None = None) -> None:
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  (lives as long as this object)
        self.process: subprocess.Popen[bytes] | _Fork
        if callable(work):
            self.process = _Fork(work, environment or {}, self.log.name)
        else:
            variables = {**os.environ, **(environment or {})}
            self.process = subprocess.Popen(work, env=variables, stdout=self.log, stderr=subprocess.STDOUT)

    def __del__(self) -> None:
        """Close its log, whenever it is that nobody looks at it any more."""
        self.log.close()

    @property
    def text(self) -> str:
        """All that it printed so far."""
        return Path(self.log.name).read_text()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Exit code; that of a killed process is the negative signal.

        Raises:
            AssertionError: if it takes longer; it is killed then.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE)
            raise AssertionError(f"no end after {seconds} s:\n{self.text[-3000:]}") from None

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Return as soon as it printed ``text``."""
        wait_until(lambda: text in self.text or self.process.poll() is not None, seconds)
        assert text in self.text, self.text[-3000:]


class _Fork:
    """What :class:`Child` needs of ``subprocess.Popen``, for a forked function that returns its exit code."""

    def __init__(self, work: Callable[[], Any], environment: Mapping[str, str], log: str) -> None:
        def enter() -> None:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            end_in_time(2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            os.environ.update(environment)
            torch.set_num_threads(1)
            sys.exit(work())

        self._process = mp.get_context("fork").Process(target=enter)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", seconds)
        return self._process.exitcode


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Poll a condition.

    Raises:
        AssertionError: if it does not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.02)


def config_file(values: Mapping[str, Any]) -> Path:
    """The config as YAML beside the run's output folder."""
    file = Path(values["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(values)))
    return file


def torchrun(count: int, *command: str) -> Child:
    """``count`` processes under torchrun: a script or ``-m module``, and its arguments."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    return Child([sys.executable, *launcher, *command])


def ranks(count: int, work: Work, first: Work = ()) -> list[Child]:
    """One process per rank without torchrun; ``first`` is the work of rank 0 instead."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Child(work if rank or not first else first, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def end_in_time(log: int | IO[str]) -> None:
    """Let the kernel end this forked process by SIGALRM after the patience, its stacks written to ``log`` before.

    A fork of a process with threads can wait for ever, for a lock that a thread held which it does not have.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=log, chain=True)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def fork(work: Callable[[], object], *, silent: bool = False) -> int:
    """Run ``work`` in a forked process; its number. It ends with code 0 if ``work`` returns, else with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        end_in_time(os.dup(2))
        if silent:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    finally:
        os._exit(code)


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its wait status (0 if it returned, 9 if it was killed)."""
    return os.waitpid(fork(work), 0)[1]


def in_world(size: int, work: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """Run ``work(rank, size)`` on each of ``size`` forked processes of one gloo group; what each returned.

    Raises:
        AssertionError: with the traceback of every process that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("fork")
    processes = [context.Process(target=_enter, args=(rank, size, work, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [rank for rank in range(size) if not (folder / f"{rank}.pt").is_file()]
    assert not failed, "\n".join(_told(folder, rank, processes[rank].exitcode) for rank in failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _told(folder: Path, rank: int, code: int | None) -> str:
    file = folder / f"{rank}.txt"
    if file.is_file():
        return file.read_text()
    stack = folder / f"{rank}.crash"
    return f"rank {rank} ended without a word, code {code}\n{stack.read_text() if stack.is_file() else ''}"


def _enter(rank: int, size: int, work: Callable[[int, int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    crash = (folder / f"{rank}.crash").open("w")
    faulthandler.enable(crash)
    end_in_time(crash)
    try:
        dist.init_process_group("gloo", f"file://{folder}/store", COLLECTIVE, size, rank)
        found = work(rank, size)
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
