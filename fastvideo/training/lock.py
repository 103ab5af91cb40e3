"""One run per output folder: the second is refused while the first is alive."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fastvideo.errors import UserError
from fastvideo.mount import check_folder

LOCK = ".lock"
PATIENCE = 0.2
"""Seconds until a held folder is refused: enough for a run that is removing its lock."""


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Create and hold the folder. An empty folder is removed on exit.

    The lock is the kernel's (``flock``): it ends with its process, so none is ever stale.

    Raises:
        UserError: naming the process and machine that hold it, the reason why it cannot be written, or what its file
            system lacks.
    """
    try:
        check_folder(output)
        output.mkdir(parents=True, exist_ok=True)
        lock = _acquire(output)
        (output / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output folder {output} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that became read-only keeps its lock file
            (output / LOCK).unlink(missing_ok=True)
            if not any(output.iterdir()):
                output.rmdir()
        lock.release()


def check_free(output: Path) -> None:
    """Refuse a folder that a living run holds, without changing it.

    Raises:
        UserError: naming the process and machine that hold it.
    """
    if (output / LOCK).exists():
        try:
            _acquire(output).release()
        except OSError as error:
            raise UserError(f"output folder {output} cannot be written: {error.strerror}") from error


def _acquire(output: Path) -> FileLock:
    """Acquire the lock; raises ``OSError`` on a file system without ``flock``, because other locks can be stale."""
    lock = FileLock(output / LOCK, timeout=PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"output folder {output} is in use by another run: {_holder(output / LOCK)}") from None
    return lock


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}; wait for it, stop it, or choose another --output"
    except (OSError, ValueError):
        return "it is just starting"
