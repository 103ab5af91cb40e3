"""A progress bar that appears only for slow work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.stopping import unit_done

Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds of work before the bar is shown."""


class PatientBar:
    """Counts units of work; shows a bar on stderr from :data:`PATIENCE` seconds on, and removes it at the end.

    Use as a context; call the object with the number of units just done.
    """

    def __init__(self, label: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        # In a log a transient bar leaves blank lines.
        self._bar = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total)
        self._begin = time.monotonic()
        self._shown = False

    def __call__(self, units: int) -> None:
        """Count ``units`` of finished work.

        Raises:
            Stopped: if a signal asked this process to stop.
        """
        unit_done()
        self._bar.update(self._task, advance=units)
        if not self._shown and time.monotonic() - self._begin > PATIENCE:
            self._bar.start()
            self._shown = True

    def __enter__(self) -> PatientBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()


def tracked(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield ``items`` and count them on a :class:`PatientBar`."""
    with PatientBar(label, total) as bar:
        for item in items:
            yield item
            bar(1)
