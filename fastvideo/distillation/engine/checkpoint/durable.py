"""Files that survive a kill or a power cut: hashed while they are written, flushed, and renamed into place.

Every change of the file system goes through functions of ``os``, one call at a time, so that a test can stop at each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 8 * 2**20
"""Bytes that are hashed and written at once."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> FileRecord:
    """A new file with that content, on the disk before this returns.

    Raises:
        OSError: if it exists already or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
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
    """Flush a folder's entries: new names in it are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> FileRecord:
    """Write a file so that its name leads to the whole old content or the whole new one, whatever happens.

    Raises:
        OSError: if it cannot be written; the old content stays then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    record = write_file(temporary, [text.encode()])
    os.replace(temporary, path)
    sync_folder(path.parent)
    return record


def make_folder(folder: Path) -> None:
    """The folder with its parents, each on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def remove_tree(folder: Path, first: Iterable[str] = ()) -> None:
    """Delete a folder; the entries named in ``first`` are gone from the disk before anything else goes."""
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
    """Size and SHA-256 of a file as it is now."""
    with path.open("rb") as stream:
        return FileRecord(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
