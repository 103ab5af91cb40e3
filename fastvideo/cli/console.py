"""Console of the verbs: width in files and pipes, readable sizes, a spinner for long work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_IN_PIPE = 120


def console(width: int = WIDTH_IN_PIPE) -> Console:
    """Standard output, with ``width`` columns if it is a file or a pipe."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else width)


@contextmanager
def patience(doing: str) -> Iterator[None]:
    """Show a spinner on a terminal's standard error while the context lasts; nothing in a file or pipe."""
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield
        return
    with err.status(f"{doing} ..."):
        yield
