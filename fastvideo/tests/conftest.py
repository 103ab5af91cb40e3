"""One folder per session for what is built once, by all processes of the session together; no width of a terminal."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

from fastvideo.tests.cache import FOLDER


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder, in the process that starts the others; forget the terminal size that readline invents."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)  # pytest imports readline, which sets them in a worker without a terminal
    if FOLDER not in os.environ:
        config.stash[OWNED] = os.environ[FOLDER] = tempfile.mkdtemp(prefix="fastvideo-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it."""
    if folder := config.stash.get(OWNED, None):
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[FOLDER]


OWNED = pytest.StashKey[str]()
