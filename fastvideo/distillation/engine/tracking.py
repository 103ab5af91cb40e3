"""Where metrics go: a JSONL file and TensorBoard in the run folder, and a progress bar. No account, no network."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.distillation.engine.durable import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes ``metrics.jsonl`` (one object per line: ``step``, ``seconds``, then the metrics) and TensorBoard events.

    Only the main process writes; the others pass ``enabled=False``.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self.console = Console(quiet=not enabled, stderr=True)
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._events: SummaryWriter | None = None
        self._rewound_to: int | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at ``step`` (the number of finished steps)."""
        if not self.enabled or not metrics:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        events = self._tensorboard()
        for name, value in metrics.items():
            events.add_scalar(name, value, step)

    def _tensorboard(self) -> SummaryWriter:
        """The event writer, opened with the first line so that a refused run leaves nothing behind."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._rewound_to is None else self._rewound_to + 1
            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        return self._events

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes those lines again."""
        file = self.folder / "metrics.jsonl"
        if self.enabled and file.is_file():
            # A run that was killed may have left half a line at the end.
            lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            replace_file(file, "".join(line for line in lines if json.loads(line)["step"] <= step))
            self._rewound_to = step

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        self.console.print(message, highlight=False)

    def progress(self, total: int, done: int) -> Tracker:
        """The bar of the run; use as a context."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self._task = self._progress.add_task("distilling", total=total, completed=done)
        return self

    def advance(self, shown: str) -> None:
        """One step done; ``shown`` stands beside the bar."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=shown)

    def __enter__(self) -> Tracker:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self._events.close()
