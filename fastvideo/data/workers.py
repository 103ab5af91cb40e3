"""Output files written in several processes: whatever their number and wherever one is killed, the same files come out.

A file is written by one process with one thread, and depends on nothing but its number.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.errors import RunError

POLL = 0.2
"""Seconds between two looks at what the processes have done."""
IMPORTED = (__name__, "diffusers.models.autoencoders", "transformers")
"""What every process needs and takes seconds to import."""
WriteFile = Callable[[int, Callable[[int], None]], None]
"""Writes the file of a number, and calls the function with how much of it is done."""


class FileJob(Protocol):
    """All that a process needs to know; it is pickled."""

    @property
    def device(self) -> str:
        """Where to compute: ``cpu``, ``cuda``, ``cuda:1``."""
        ...

    @property
    def files(self) -> int:
        """How many files there are."""
        ...

    def size(self, number: int) -> int:
        """How much there is to do for a file."""
        ...

    def writer(self, device: str) -> WriteFile:
        """What writes a file; made once per process, as loading a model takes its time."""
        ...


def start_server(module: str) -> None:
    """Start the process that the others are forked from: it imports once for all, while this one loads the model.

    ``module`` is the job's own.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*IMPORTED, module])
    forkserver.ensure_running()


def write_files(job: FileJob, missing: Sequence[int], workers: int, show: Callable[[int], None]) -> None:
    """Write the files of those numbers, in this process or in ``workers`` others.

    Raises:
        RunError: if a process dies; the same call goes on from there.
    """
    if workers == 1 or not missing:
        _write_here(job, missing, show)
    else:
        _write_in_processes(job, missing, min(workers, len(missing)), show)


@contextmanager
def progress(label: str, total: int, before: int) -> Iterator[Callable[[int], None]]:
    """A bar with an estimate on stderr; call with what is done by this call so far."""
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
            before += job.size(number)
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
"""What a process keeps between two files."""


def _start_worker(job: FileJob, counts: Any, order: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and says so once
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with order.get_lock():
        number, order.value = order.value, order.value + 1
    device = job.device
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    _worker.update(write=job.writer(device), counts=counts, stop=stop)


def _die_with_parent() -> None:
    """A process that outlived a killed parent would write into the folder of the next call."""
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
