"""Dump all stacks and the last collectives, and exit when no step finishes in time."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from fastvideo.distillation.engine.optional.recorder import write_collectives
from fastvideo.errors import EXIT_STALLED
from fastvideo.stopping import leave_word, units

OTHERS_DUMP = 6.0
"""Seconds between dump and exit, in which the others write their stacks before they lose this process."""


class Watchdog:
    """Watches the progress of all processes together from a thread.

    Progress is a unit of work on any process (a step, a network call of a validation), because one may validate while
    the others wait for it.

    Args:
        seconds: longest time without progress; 0 waits for ever.
        folder: parent of ``rank-N.txt``, ``gloo-rank-N`` and ``nccl-rank-N``.
        rank: of this process.
    """

    def __init__(self, seconds: float, folder: Path, rank: int = 0) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        self.poll = min(5.0, seconds / 10)
        self._over, self._given_up = threading.Event(), threading.Event()
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the context ends; once the watchdog gives up, it alone ends the process.

        A rank that exits breaks the connections of those that still wait for it: their error must not exit before they
        have written their stacks.
        """
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self.seconds:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            if self._given_up.is_set():
                thread.join()

    def _watch(self) -> None:
        idle, seen, before = 0.0, self._progress(), time.monotonic()
        while not self._over.wait(self.poll):
            now = time.monotonic()
            # A suspended process was not idle, though its clock ran on.
            idle, before = idle + min(now - before, 2 * self.poll), now
            if (progress := self._progress()) != seen:
                idle, seen = 0.0, progress
            if idle > self.seconds:
                self._give_up(seen)

    def _progress(self) -> list[int]:
        """Units of every process, by rank; -1 for one that has not reported yet."""
        if self._store is None:
            return [units()]
        self._store.set(f"fastvideo/units/{self.rank}", str(units()))
        keys = [f"fastvideo/units/{rank}" for rank in range(self._world_size)]
        return [int(self._store.get(key)) if self._store.check([key]) else -1 for key in keys]

    def _give_up(self, progress: list[int]) -> None:
        self._given_up.set()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank}.txt"
        behind = [rank for rank, done in enumerate(progress) if done == min(progress)]
        who = f", least far: rank {', '.join(map(str, behind))}" if len(progress) > 1 else ""
        message = f"rank {self.rank}: no process got on for {self.seconds:g} s (trainer.watchdog_seconds){who}"
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{message}\n\n")  # beside the stacks, so that the file explains itself
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"error: {message}; stacks: {path}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__.fileno() if sys.__stderr__ else 2, all_threads=True)
        # In a thread: whatever becomes of it, this process ends.
        threading.Thread(target=write_collectives, args=(self.folder, self.rank), daemon=True).start()
        time.sleep(OTHERS_DUMP)
        leave_word(EXIT_STALLED)
        os._exit(EXIT_STALLED)
