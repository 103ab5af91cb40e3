"""What verbs print to: one width for files and pipes, one spelling of sizes, one sign of patience."""

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
    """Standard output; ``width`` columns where it is a file or a pipe, which has none of its own."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else width)


@contextmanager
def patience(doing: str) -> Iterator[None]:
    """Show on a terminal's standard error that work goes on, until it is done; in a file or pipe nothing."""
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield
        return
    with err.status(f"{doing} ..."):
        yield
