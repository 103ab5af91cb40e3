"""One run per output folder: the second is refused while the first is alive."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastvideo.distillation.types import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be; it is gone again afterwards if nothing else came into it.

    The lock is the kernel's (``flock``): it ends with its process, however that ends, so none is ever stale.

    Raises:
        UserError: naming the process and machine that hold it, or saying why the folder cannot be used.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(output)
    except OSError as error:
        raise UserError(f"output folder {output} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(
            OSError
        ):  # a folder that has become read-only keeps its lock file, which holds nothing
            (output / LOCK).unlink(missing_ok=True)
            if not any(output.iterdir()):
                output.rmdir()
        os.close(descriptor)


def check_free(output: Path) -> None:
    """Refuse a folder that a living run holds; nothing is changed.

    Raises:
        UserError: naming the process and machine that hold it.
    """
    path = output / LOCK
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _flock(descriptor, output)
        finally:
            os.close(descriptor)


def _flock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _described(os.read(descriptor, 4096))
        raise UserError(f"output folder {output} is in use by another run: {holder}") from None


def _acquire(output: Path) -> int:
    path = output / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _flock(descriptor, output)
        except UserError:
            os.close(descriptor)
            raise
        # The one before may have removed the name between our opening and our locking: then this file is nobody's.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            return descriptor
        os.close(descriptor)


def _described(content: bytes) -> str:
    try:
        holder = json.loads(content)
    except ValueError:
        return "it is just starting"
    return f"process {holder['pid']} on {holder['host']}; wait for it, stop it, or choose another --output"
