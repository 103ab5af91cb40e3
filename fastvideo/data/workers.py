"""Write output files in several processes, resumable after a kill.

One process with one thread writes a file, which depends on its number alone: any number of processes and any
interruption give the same files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.errors import RunError
from fastvideo.shares import Share

POLL = 0.2
"""Seconds between two updates of the progress bar."""
IMPORTED = (__name__, "diffusers.models.autoencoders", "transformers")
"""Slow imports that every process needs."""
WriteFile = Callable[[int, Callable[[int], None]], None]
"""Writes the file of a number; calls the function with the count of finished items."""


@dataclass(frozen=True)
class FileJob(ABC):
    """Items that become the rows of several files; pickled for the processes.

    Attributes:
        out: the folder.
        per_file: items per output file.
        device: of the networks: ``cpu``, ``cuda``, ``cuda:1``.
    """

    out: Path
    per_file: int
    device: str

    @abstractmethod
    def __len__(self) -> int:
        """Items of all files."""

    @property
    def files(self) -> int:
        return -(-len(self) // self.per_file)

    def part(self, number: int) -> range:
        """Items of one output file."""
        return range(number * self.per_file, min((number + 1) * self.per_file, len(self)))

    def own(self, share: Share) -> list[int]:
        """Numbers of the files of one machine."""
        return [number for number in range(self.files) if number in share]

    def count(self, numbers: Iterable[int]) -> int:
        """Items of some of the files."""
        return sum(len(self.part(number)) for number in numbers)

    @abstractmethod
    def writer(self, device: str) -> WriteFile:
        """Load the model and return the function that writes a file; called once per process."""


def start_server(module: str) -> None:
    """Start the fork server, which imports for all processes and also ``module``, the job's own."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*IMPORTED, module])
    forkserver.ensure_running()


def write_files(job: FileJob, missing: Sequence[int], workers: int, show: Callable[[int], None]) -> None:
    """Write the files of the numbers ``missing``, in this process or in ``workers`` others.

    Raises:
        RunError: if a process dies; the same call then continues.
    """
    if workers == 1 or not missing:
        _write_here(job, missing, show)
    else:
        _write_in_processes(job, missing, min(workers, len(missing)), show)


@contextmanager
def progress(label: str, total: int, before: int) -> Iterator[Callable[[int], None]]:
    """Progress bar on stderr; call it with the number of items that this call has finished."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=total, completed=before)
        yield lambda done: bar.update(task, completed=before + done)


def _write_here(job: FileJob, missing: Sequence[int], show: Callable[[int], None]) -> None:
    if not missing:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a process of its own: sums in another order would give other bits
    try:
        write, before = job.writer(job.device), 0
        for number in missing:
            write(number, lambda done, base=before: show(base + done))  # type: ignore[misc]
            before += len(job.part(number))
    finally:
        torch.set_num_threads(threads)


def _write_in_processes(job: FileJob, missing: Sequence[int], workers: int, show: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("forkserver")
    counts = context.RawArray("L", max(1, job.files))
    order, stop = context.Value("L", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, counts, order, stop))
    try:
        _watch({pool.submit(_write_file, number) for number in missing}, lambda: show(sum(counts)))
    except BrokenProcessPool as error:
        raise RunError("a process was killed (out of memory?); run the same command again to go on") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _watch(pending: set[Future[None]], show: Callable[[], None]) -> None:
    while pending:
        finished, pending = wait(pending, timeout=POLL)
        show()
        for future in finished:
            future.result()


_worker: dict[str, Any] = {}
"""State of a worker process between two files."""


def _start_worker(job: FileJob, counts: Any, order: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with order.get_lock():
        number, order.value = order.value, order.value + 1
    device = job.device
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    _worker.update(write=job.writer(device), counts=counts, stop=stop)


def _die_with_parent() -> None:
    """End with the parent: a surviving process would write into the folder of the next call."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_file(number: int) -> None:
    def done(count: int) -> None:
        _worker["counts"][number] = count
        if _worker["stop"].is_set():
            os._exit(1)

    _worker["write"](number, done)
