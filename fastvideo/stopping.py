"""Graceful stop on signals: a signal sets a flag, and work checks the flag between its units.

The flag is process-wide, because signal handlers are. A thread watches for signals, so that a second one ends the
process even while the main thread is inside a library's call.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from fastvideo.errors import Stopped

_SHOW_CURSOR = b"\x1b[?25h"
_received: list[int] = []
_units = [0]


def received() -> int:
    """Number of the signal that asked this process to stop; 0 for none."""
    return _received[0] if _received else 0


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


def _nothing(number: int, frame: object) -> None:
    """Handle the signal, without which its number would not reach the thread."""


def _watch(source: socket.socket, wanted: frozenset[int]) -> None:
    """Set the flag at the first signal, end the process at the second."""
    with source:
        while data := source.recv(64):
            for number in filter(wanted.__contains__, data):
                if _received:
                    _leave(number)
                _received.append(number)
                _say(f"{signal.Signals(number).name}: stopping at the next safe point; once more stops at once")


def _leave(number: int) -> None:
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR)
    _say(f"{signal.Signals(number).name} again: stopped at once, nothing was saved")
    os._exit(128 + number)


def _say(message: str) -> None:
    """Print one line from the first process, unbuffered: the main thread may hold the buffer's lock."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
