"""Toy models that are built once per test session, whichever of its processes needs one first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

FOLDER = "FASTVIDEO_TESTS_CACHE"
"""The environment variable with the session's folder; without it everything is built where it is needed."""


def built(folder: Path, name: str, build: Callable[[Path], object]) -> Path:
    """``folder`` with a copy of what ``build`` writes into a folder, or as it is if it exists.

    Args:
        folder: the copy: a test may do with it what it likes.
        name: of the thing in the cache; two that differ have two names.
        build: writes the folder that it is given, and always the same.
    """
    if folder.exists():
        return folder
    if FOLDER not in os.environ:
        build(folder)
        return folder
    original = Path(os.environ[FOLDER]) / name
    with original.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not original.exists():
            build(original.with_name(f"{name}.part"))
            original.with_name(f"{name}.part").rename(original)
    shutil.copytree(original, folder)
    return folder
