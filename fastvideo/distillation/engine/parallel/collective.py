"""Host-side agreement between ranks, and detection of lost ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from time import monotonic, sleep
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from fastvideo.distillation.engine.parallel.distributed import largest_signal
from fastvideo.errors import RunError, UserError
from fastvideo.stopping import Stopped, all_saved, received, step_done

T = TypeVar("T")
PROBE_SECONDS = 5.0
"""Seconds in which living ranks answer, once one of them is missed."""
TIMEOUT = timedelta(days=1)
"""Longest wait for a rank that does other work, such as the main process in a validation."""


@lru_cache(maxsize=1)
def _patient_group(_: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group beside the default one, for waits that are as long as another rank's work takes."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return group


class Agreement:
    """Decides alike on all ranks on the host, over a gloo group of its own, so that nothing waits for a device.

    Its waits last up to :data:`TIMEOUT`; a rank that dies ends them at once.
    """

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = _patient_group(dist.distributed_c10d._get_default_group()) if several else None

    @property
    def alone(self) -> bool:
        """True in a run of one process."""
        return self._group is None

    def stop_signal(self) -> int:
        """Largest number of a signal that asked any rank to stop; 0 if none was asked."""
        return received() if self._group is None else largest_signal(self._group)

    def wait(self) -> None:
        """Wait for all ranks, however long one of them validates, reads or hashes."""
        if self._group is not None:
            dist.barrier(self._group)

    def from_main(self, value: T) -> T:
        """Share the main process's value; those of the others are dropped."""
        if self._group is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        return shared[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Call ``action`` on the main process; the others wait for it, however long it takes, and get its result.

        Raises:
            UserError: on all processes, if the call raised it; so for ``RunError``.
        """
        outcome: tuple[T | None, UserError | RunError | None] = (None, None)
        try:
            if self._group is None or dist.get_rank() == 0:
                outcome = (action(), None)
        except (UserError, RunError) as error:
            outcome = (None, error)
        result, failure = self.from_main(outcome)
        if failure is not None:
            raise failure
        return cast(T, result)

    def from_all(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found

    def leave(self, number: int, message: str) -> NoReturn:
        """Wait for all ranks before this one ends, and ignore further signals from then on.

        Raises:
            Stopped: by that signal, with the message.
        """
        self.step_done()
        self.stop_signal()
        all_saved()
        raise Stopped(number, message)

    def step_done(self) -> None:
        """Tell the watchdog that this rank is alive."""
        step_done()


def check_agreement(what: str, values: Mapping[str, Any]) -> None:
    """Check that every process was given the same ``values`` (flat, key to value).

    Raises:
        UserError: on all of them, naming the first key that differs, with its value on two ranks.
    """
    if not dist.is_initialized():
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(values))
    for rank, other in enumerate(gathered):
        for key in sorted(gathered[0].keys() | other.keys()):
            if gathered[0].get(key) != other.get(key):
                raise UserError(
                    f"the processes were given different {what}s: {key} is {gathered[0].get(key)!r} on rank 0 and "
                    f"{other.get(key)!r} on rank {rank}; start all with the same file and flags"
                )


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn a collective that failed because a process is gone into an error that names its rank.

    Raises:
        RunError: with the ranks that no longer answer.
        Stopped: if a signal stopped them, and asked this process too.
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
        lost = _probe()
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


def _probe() -> list[int]:
    """Ranks that do not answer through the store within :data:`PROBE_SECONDS`; no collective runs."""
    store, world_size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    names = [f"fastvideo/here/{rank}" for rank in range(world_size)]
    store.set(names[dist.get_rank()], "1")
    deadline = monotonic() + PROBE_SECONDS
    while monotonic() < deadline and not all(store.check([name]) for name in names):
        sleep(0.1)
    return [rank for rank, name in enumerate(names) if not store.check([name])]


def first_to_report(message: str) -> bool:
    """True for the first rank that reports ``message``: all ranks meet the same mistake, one prints it.

    Asks torchrun's store, which exists before and after the process group.
    """
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) == 1 or "MASTER_PORT" not in environment:
        return True
    attempt = f"{environment.get('TORCHELASTIC_RUN_ID')}/{environment.get('TORCHELASTIC_RESTART_COUNT')}"
    key = f"fastvideo/message/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), None, False, timedelta(seconds=PROBE_SECONDS)
        )
        return bool(store.add(key, 1) == 1)
    except RuntimeError:  # without a store, twice is better than never
        return True
