"""Graceful stop on signals: a signal sets a flag, and work checks the flag between its units.

The flag is process-wide, because signal handlers are. A thread watches for signals, so that a second one ends the
process even while the main thread is inside a library's call.

torchrun kills its processes some time after it has passed a signal on (:func:`grace`), and ends with 1 whatever they
ended with; :func:`leave_word` tells the script around it (``examples/launch/torchrun.sh``) their own exit code.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version

from fastvideo.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

GRACE_VARIABLE, DEFAULT_GRACE, GRACE_SINCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30, (2, 12)
"""Variable with torchrun's seconds between a signal and SIGKILL; its default; the first torch that reads it."""
EXIT_CODES = "FASTVIDEO_EXIT_CODES"
"""Environment variable with the file to which every process of a launch appends its exit code, unless it is 0."""

_SHOW_CURSOR = b"\x1b[?25h"
_received: list[int] = []
_received_at: list[float] = []
_saved: list[bool] = []
_units = [0]


class Stopped(Exception):
    """A run that a signal stopped at a safe point.

    Args:
        number: of the signal.
        message: step and saved checkpoint.
    """

    def __init__(self, number: int, message: str = "in preparation, before a step was taken; start it again") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 for a scheduler's signal."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_PREEMPTED


def received() -> int:
    """Number of the signal that asked this process to stop; 0 for none."""
    return _received[0] if _received else 0


def grace() -> int | None:
    """Seconds that torchrun leaves between a signal and SIGKILL; ``None`` for a process that it did not start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    told = os.environ.get(GRACE_VARIABLE, "")
    reads = tuple(map(int, version("torch").split(".")[:2])) >= GRACE_SINCE
    return int(told) if told.isdecimal() and reads else DEFAULT_GRACE


def time_taken() -> str:
    """Time since this process was asked to stop beside the :func:`grace`, for a message; empty without either."""
    allowed = grace()
    if allowed is None or not _received_at:
        return ""
    return f" {time.monotonic() - _received_at[0]:.0f} s after the signal, of the {allowed} s that torchrun leaves"


def all_saved() -> None:
    """Ignore further signals: this process only has to end, and torchrun signals those that end later than others."""
    _saved.append(True)


def leave_word(code: int) -> None:
    """Append an exit code other than 0 to the file that the launch script reads, if there is one."""
    if code and (file := os.environ.get(EXIT_CODES)):
        with suppress(OSError), open(file, "a", encoding="utf-8") as words:  # the process ends: there is nobody to tell
            words.write(f"{code}\n")


def unit_done() -> None:
    """Count a finished unit of work, and stop here if a signal came.

    Raises:
        Stopped: if this process was asked to stop.
    """
    _units[0] += 1
    if _received:
        raise Stopped(_received[0])


def step_done() -> None:
    """Count a finished step, after which all processes decide together to stop or go on."""
    _units[0] += 1


def units() -> int:
    """Number of units of work that this process has done: it is alive while this grows."""
    return _units[0]


@contextmanager
def listening(names: Sequence[str]) -> Iterator[None]:
    """Let the named signals ask for a stop; names unknown to this system are ignored.

    Only the main thread can listen; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    threading.Thread(target=_watch, args=(reading, frozenset(numbers)), name="signals", daemon=True).start()
    before = {number: signal.signal(number, _nothing) for number in numbers}
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()
        _received.clear()
        _received_at.clear()
        _saved.clear()


def _nothing(number: int, frame: object) -> None:
    """Handle the signal, without which its number would not reach the thread."""


def _watch(source: socket.socket, wanted: frozenset[int]) -> None:
    """Set the flag at the first signal, end the process at the second."""
    with source:
        while data := source.recv(64):
            for number in filter(wanted.__contains__, data):
                if _saved:
                    continue
                if _received:
                    _leave(number)
                _received.append(number)
                _received_at.append(time.monotonic())
                allowed = grace()
                within = "" if allowed is None else f", within the {allowed} s that torchrun leaves"
                name = signal.Signals(number).name
                _say(f"{name}: stopping at the next safe point{within}; once more stops at once")


def _leave(number: int) -> None:
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR)
    _say(f"{signal.Signals(number).name} again: stopped at once, nothing was saved")
    leave_word(128 + number)
    os._exit(128 + number)


def _say(message: str) -> None:
    """Print one line from the first process, unbuffered: the main thread may hold the buffer's lock."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
