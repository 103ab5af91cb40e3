"""One folder per session for what is built once, by all its processes together; one thread; no width of a terminal."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from fastvideo.tests.cache import FOLDER

gc.set_threshold(50_000)  # looking for cycles among the objects of torch and its company takes a tenth of the time
# A fork has none of its parent's threads, and waits for ever if it frees what they belong to, such as PyAV's rescaler.
os.register_at_fork(after_in_child=gc.freeze)


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch at one thread, whatever a recipe asks for: threads without cores of their own wait by spinning."""
    import torch

    torch.set_num_threads(1)
    with patch.object(torch, "set_num_threads", lambda count: None):
        yield


OWNED = pytest.StashKey[str]()
