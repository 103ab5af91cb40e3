"""Where metrics go: a JSONL file and TensorBoard in the run folder, and a progress bar. No account, no network."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.distillation.config.schema import TrackingConfig
from fastvideo.distillation.engine.optional.trackers import Isolated, Open, Package, TensorBoard
from fastvideo.files import replace_file

PERFORMANCE = "performance.jsonl"
LOGS = ("metrics.jsonl", "health.jsonl", PERFORMANCE)
"""Files of a run with one object per line, each of a step."""


CUT_SHORT = {"window": "cut short"}
"""In a line that a run wrote as it ended, in the middle of a window."""


def _stays(line: Mapping[str, object], step: int) -> bool:
    """True for a line that a run which goes on after ``step`` will not write again."""
    return int(str(line["step"])) <= step and not CUT_SHORT.items() <= line.items()


class Tracker:
    """Writes ``metrics.jsonl`` (one object per line: ``step``, ``seconds``, then the metrics) and feeds other trackers.

    Args:
        enabled: only the main process writes.
        options: which external trackers.
        more: others, by name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        options: TrackingConfig | None = None,
        more: Mapping[str, Open] | None = None,
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self.options, self.more = options or TrackingConfig(), dict(more or {})
        self.console = Console(quiet=not enabled, stderr=True)
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._trackers: list[Isolated] | None = None
        self._rewound_to: int | None = None

    def log(
        self,
        metrics: Mapping[str, float],
        step: int,
        *,
        closing: bool = False,
        performance: Mapping[str, float] | None = None,
    ) -> None:
        """Record metrics at ``step`` (the number of finished steps).

        Args:
            closing: of the part of a window in which the run ended: a run that goes on writes the whole one instead.
            performance: figures of the clock and the machine, which no two runs share: a file of their own.
        """
        if not self.enabled or not metrics:
            return
        line: dict[str, object] = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        line |= CUT_SHORT if closing else {}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if performance:
            self.write_line(PERFORMANCE, {"step": step, **performance})
        for tracker in self._external():
            tracker.log({**metrics, **(performance or {})}, step)

    def write_line(self, name: str, line: Mapping[str, object]) -> None:
        """Append an object with a ``step`` to a file of the run folder; resuming rewinds those of :data:`LOGS`."""
        if self.enabled:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _external(self) -> list[Isolated]:
        """The trackers, made when there is something to keep."""
        if self._trackers is None:
            makers = {name: self._opened(name) for name in self.options.backends} | self.more
            self._trackers = [Isolated(name, make, self.say) for name, make in makers.items()]
        return self._trackers

    def _opened(self, name: str) -> Open:
        """How to open a tracker, in its own thread."""
        if name == "tensorboard":
            return partial(TensorBoard, self.folder, None if self._rewound_to is None else self._rewound_to + 1)
        return partial(Package, name, self.options.project, self.options.name or self.folder.resolve().name)

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes those lines again."""
        for file in (self.folder / name for name in LOGS):
            if self.enabled and file.is_file():
                # A run that was killed may have left half a line at the end.
                lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
                replace_file(file, "".join(line for line in lines if _stays(json.loads(line), step)))
                self._rewound_to = step

    def say(self, message: str) -> None:
        """One line for the person who watches; not broken, so that a command in it can be copied."""
        self.console.print(message, highlight=False, soft_wrap=True)

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
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None
