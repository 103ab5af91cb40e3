"""Who is still there: decisions that all processes take alike, and the names of those that do not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep

import torch
import torch.distributed as dist

from fastvideo.distillation.engine.parallel.distributed import ROLL_CALL
from fastvideo.errors import RunError, Stopped
from fastvideo.stopping import received

PATIENCE = timedelta(days=1)
"""How long processes wait for one that does what they do not, such as validate."""


class Agreement:
    """What all processes decide alike on the host, over a gloo group of its own: nothing waits for a device.

    The others wait here while the main process validates, so the group's time-out is long.
    """

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    @property
    def several(self) -> bool:
        """True if there are other processes."""
        return self._group is not None

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self._group is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return int(shared)


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn a collective that failed because a process is gone into an error that names it.

    Raises:
        RunError: with the ranks that do not answer any more.
        Stopped: if they were asked to stop, as this process was.
    """
    try:
        yield
    except Stopped:
        if dist.is_initialized():
            dist.distributed_c10d._get_default_store().set(f"fastvideo/stopped/{dist.get_rank()}", "1")
        raise
    except RuntimeError as error:
        if not dist.is_initialized() or not _of_collective(error):
            raise
        lost = _roll_call()
        if not lost:
            raise
        store, signal = dist.distributed_c10d._get_default_store(), received()
        if signal and any(store.check([f"fastvideo/stopped/{rank}"]) for rank in lost):
            raise Stopped(signal) from error
        names = ", ".join(map(str, lost))
        raise RunError(
            f"lost contact with rank {names} (it died, or waits elsewhere): {str(error).splitlines()[0]}. "
            f"Look at the end of its output, then continue from the newest checkpoint with --resume"
        ) from error


def _of_collective(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "watchdog", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _roll_call() -> list[int]:
    """The ranks that do not answer within :data:`ROLL_CALL` seconds, through the store and not through a collective."""
    store, world_size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    names = [f"fastvideo/here/{rank}" for rank in range(world_size)]
    store.set(names[dist.get_rank()], "1")
    deadline = monotonic() + ROLL_CALL
    while monotonic() < deadline and not all(store.check([name]) for name in names):
        sleep(0.1)
    return [rank for rank, name in enumerate(names) if not store.check([name])]
