"""Durable files: written, flushed and renamed into place, so that a kill or a power cut leaves the old or the new one.

:func:`write_file` and :func:`replace_file` make every change by one call of ``os``, so that a test can stop at each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHUNK = 8 * 2**20
"""Bytes that are hashed and written at once."""


@dataclass(frozen=True)
class FileRecord:
    """Size of a file in bytes and its SHA-256."""

    size: int
    sha256: str


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, on the disk before this returns.

    Raises:
        OSError: if it exists already or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    digest, size = hashlib.sha256(), 0
    try:
        for block in content:
            rest = memoryview(block).cast("B")
            while rest:
                written = os.write(descriptor, rest[:CHUNK])
                digest.update(rest[:written])
                size, rest = size + written, rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    _flush(folder)


def replace_file(path: Path, content: str | bytes) -> FileRecord:
    """Replace a file atomically: its name leads to the whole old content or the whole new one.

    For one process at a time per path; text is UTF-8.

    Raises:
        OSError: if it cannot be written; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    record = write_file(temporary, [content.encode() if isinstance(content, str) else content])
    os.replace(temporary, path)
    sync_folder(path.parent)
    return record


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path for a library to write to; the file replaces ``path`` at the end, with normal permissions.

    Of several processes at once, on several machines too, the last one wins. If the body raises, ``path`` stays as it
    was.
    """
    temporary = path.with_name(f".{path.name}.{_writer()}.part")
    try:
        yield temporary
        _make_readable(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _writer() -> str:
    """Name of this thread among those of all machines."""
    return f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which replaces ``folder`` at the end; its files get normal permissions.

    If the body raises, ``folder`` stays as it was.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in filter(_is_file, partial.rglob("*")):
            _make_readable(file)
        if folder.is_dir():
            shutil.rmtree(folder)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_readable(file: Path) -> None:
    """Set the permissions of the user's umask; safetensors writes files for the owner alone."""
    file.chmod(0o666 & ~_umask())


def _is_file(path: Path) -> bool:
    """True for a file, and not for a link to one."""
    return stat.S_ISREG(path.lstat().st_mode)


@cache
def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create the folder and its parents, each on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def remove_tree(folder: Path, first: Iterable[str] = ()) -> None:
    """Delete a folder; the entries named in ``first`` go first, on the disk too."""
    if not folder.is_dir():
        return
    for name in first:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
            sync_folder(folder)
    for entry in sorted(folder.iterdir()):
        if stat.S_ISDIR(entry.lstat().st_mode):
            remove_tree(entry)
        else:
            os.unlink(entry)
    os.rmdir(folder)


def record_of(path: Path) -> FileRecord:
    """Measure a file: size and SHA-256."""
    with path.open("rb") as stream:
        return FileRecord(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def readable_size(count: float) -> str:
    """Size of a file: bytes in the decimal unit that suits them."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def gib(value: float) -> str:
    """Size of memory: bytes in GiB, or in MiB below a tenth of one."""
    return f"{value / 2**30:.2f} GiB" if value >= 0.1 * 2**30 else f"{value / 2**20:.2f} MiB"
