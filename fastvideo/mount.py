"""Trial of a folder: it tells, before a run does, if the file system can do what a run relies on.

Buckets mounted as folders lack append, rename or locks, network disks lock or flush in their own way; a run on them
fails at its first checkpoint, or its files are not what they seem.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fastvideo.errors import UserError


@dataclass(frozen=True)
class Trial:
    """One ability of a file system.

    Attributes:
        name: of the ability.
        use: what a run needs it for.
        attempt: tries it in an empty folder; returns what is wrong, or raises ``OSError``.
    """

    name: str
    use: str
    attempt: Callable[[Path], str | None]


def try_folder(folder: Path) -> dict[str, str]:
    """Abilities that a folder lacks: the name of each to what happened. It is left as it was.

    Args:
        folder: exists, or the nearest folder above it is tried.

    Raises:
        OSError: if nothing can be created in it at all.
    """
    while not folder.is_dir():
        folder = folder.parent
    lacking = {}
    place = Path(tempfile.mkdtemp(prefix=".trial-", dir=folder))
    try:
        for trial in TRIALS:
            own = place / trial.name.replace(" ", "-")
            own.mkdir()
            if problem := _problem(trial, own):
                lacking[trial.name] = problem
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return lacking


def check_folder(folder: Path) -> None:
    """Refuse an output folder whose file system lacks what a run needs.

    Raises:
        UserError: with everything that it lacks, and what each is needed for.
        OSError: if nothing can be created in it at all.
    """
    lacking = try_folder(folder)
    if lacking:
        uses = {trial.name: trial.use for trial in TRIALS}
        lines = [f"{name} ({problem}), for {uses[name]}" for name, problem in lacking.items()]
        raise UserError(
            f"output folder {folder}: its file system cannot do what a run needs:\n  "
            + "\n  ".join(lines)
            + f"\nGive a folder on a disk as --output and copy the results from there; {MEND}"
        )


def check_writable(path: Path, label: str = "--out") -> None:
    """Refuse a place for a file or folder at which none can be made, before time is spent on what would go there.

    Raises:
        UserError: naming the place, and what stands in the way.
    """
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    folder = there if there.is_dir() else there.parent
    if there.is_file() and there != path:
        raise UserError(f"{label} {path} cannot be written: {there} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{label} {path} cannot be written: no permission to write to {folder.absolute()}")


MEND = "a bucket needs a mount with a cache on the disk (SkyPilot: MOUNT_CACHED, rclone: --vfs-cache-mode full)"


def _problem(trial: Trial, folder: Path) -> str | None:
    try:
        return trial.attempt(folder)
    except OSError as error:
        return error.strerror or type(error).__name__


def _append(folder: Path) -> str | None:
    file = folder / "lines"
    for line in ("one\n", "two\n"):
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line)
    return None if file.read_text(encoding="utf-8") == "one\ntwo\n" else "what was there before is lost"


def _replace(folder: Path) -> str | None:
    old, new = folder / "old", folder / "new"
    old.write_text("old", encoding="utf-8")
    new.write_text("new", encoding="utf-8")
    os.replace(new, old)
    return None if old.read_text(encoding="utf-8") == "new" and not new.exists() else "the old content stays"


def _rename_folder(folder: Path) -> str | None:
    before, after = folder / "before", folder / "after"
    before.mkdir()
    (before / "file").write_text("kept", encoding="utf-8")
    before.rename(after)
    return (
        None
        if (after / "file").read_text(encoding="utf-8") == "kept" and not before.exists()
        else "its files do not move with it"
    )


def _exclusive(folder: Path) -> str | None:
    for _ in range(2):
        try:
            os.close(os.open(folder / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return None
    return "a file can be created twice"


def _lock(folder: Path) -> str | None:
    first, second = (FileLock(folder / "lock", timeout=0, fallback_to_soft=False) for _ in range(2))
    with first:
        try:
            with second:
                return "two can hold it at a time"
        except Timeout:
            return None


def _flush(folder: Path) -> str | None:
    with (folder / "file").open("w", encoding="utf-8") as stream:
        stream.write("kept")
        stream.flush()
        os.fsync(stream.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


TRIALS = (
    Trial("append to a file", "metrics", _append),
    Trial("replace a file", "the manifest of a checkpoint, the config", _replace),
    Trial("rename a folder", "the result", _rename_folder),
    Trial("create a file once", "checkpoints", _exclusive),
    Trial("lock a file", "keeping a second run out", _lock),
    Trial("flush to the disk", "checkpoints that survive a power cut", _flush),
)
"""Abilities that a run needs of its folder's file system."""
