"""Metrics: means on the device between log steps, then a JSONL file, a progress bar and external trackers.

External trackers each run behind a bounded queue in a daemon thread. One that raises, hangs or has no network is
dropped; training never waits for it, and at the end each has :data:`GRACE` seconds to write what it holds.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fastvideo.distillation.config.schema import TrackingConfig
from fastvideo.distillation.engine.parallel.distributed import average
from fastvideo.errors import UserError
from fastvideo.files import replace_file

PERFORMANCE = "performance.jsonl"
LOGS = ("metrics.jsonl", "health.jsonl", PERFORMANCE)
"""Files of a run with one object per line, each of a step."""
CUT_SHORT = {"window": "cut short"}
"""Mark of a line that a run wrote as it ended, in the middle of a window."""
CAPACITY = 256
"""Lines that may wait; a tracker that is further behind is dropped."""
GRACE = 5.0
"""Seconds that a tracker has at the end."""
EXTRAS = ("wandb", "trackio")
"""Trackers that are an optional dependency of the same name."""


class Metrics:
    """Means since the last drain; one transfer and one all-reduce per log step, none in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Add one observation (a detached scalar tensor) of each name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """Mean of each name over its observations and over processes; starts a new window."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = [self._sums[name] / self._counts[name] for name in names]
        # Learning rates and a restored window are on the CPU, losses where the networks are.
        device = next((mean.device for mean in means if mean.device.type != "cpu"), means[0].device)
        averaged = average(torch.stack([mean.to(device) for mean in means]))
        self._sums, self._counts = {}, {}
        return dict(zip(names, averaged.tolist(), strict=True))

    def state_dict(self) -> dict[str, object]:
        """The open window."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue the window."""
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}


class Backend(Protocol):
    """An external tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None:
        """Write everything that is still held."""
        ...


Open = Callable[[], Backend]
"""Makes a backend, in the backend's thread: it may take long, ask a server, or fail."""


class Tracker:
    """Writes ``metrics.jsonl`` (one object per line: ``step``, ``seconds``, then the metrics) and feeds other trackers.

    Args:
        enabled: only the main process writes.
        options: external trackers.
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
            closing: the run ends inside the window; a run that resumes writes the whole window instead.
            performance: figures of the clock and the machine, which differ in every run: a file of their own.
        """
        if not self.enabled or not metrics:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        self.write_line("metrics.jsonl", {**line, **(CUT_SHORT if closing else {})})
        if performance:
            self.write_line(PERFORMANCE, {"step": step, **performance})
        if self._trackers is None:  # opened when there is something to keep
            makers = {name: self._opened(name) for name in self.options.backends} | self.more
            self._trackers = [Isolated(name, make, self.say) for name, make in makers.items()]
        for tracker in self._trackers:
            tracker.log({**metrics, **(performance or {})}, step)

    def write_line(self, name: str, line: Mapping[str, object]) -> None:
        """Append an object with a ``step`` to a file of the run folder; resuming rewinds those of :data:`LOGS`."""
        if self.enabled:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _opened(self, name: str) -> Open:
        if name == "tensorboard":
            return partial(TensorBoard, self.folder, None if self._rewound_to is None else self._rewound_to + 1)
        return partial(Package, name, self.options.project, self.options.name or self.folder.resolve().name)

    def rewind(self, step: int) -> None:
        """Remove the lines after ``step``, which a resumed run writes again."""
        for file in (self.folder / name for name in LOGS):
            if self.enabled and file.is_file():
                # A run that was killed may have left half a line at the end.
                lines = [
                    line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
                ]
                replace_file(file, "".join(line for line in lines if _stays(json.loads(line), step)))
                self._rewound_to = step

    def say(self, message: str) -> None:
        """Print one unbroken line, so that a command in it can be copied."""
        self.console.print(message, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Show the bar of the run; close the external trackers at the end."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as self._progress:
                self._task = self._progress.add_task("distilling", total=total, completed=done)
                yield
        finally:
            for tracker in self._trackers or ():
                tracker.close()
            self._trackers = None

    def advance(self, shown: str) -> None:
        """Move the bar by one step; ``shown`` stands beside it."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=shown)


def _stays(line: Mapping[str, object], step: int) -> bool:
    """True for a line that a run which resumes after ``step`` does not write again."""
    return int(str(line["step"])) <= step and not CUT_SHORT.items() <= line.items()


def check_installed(name: str) -> None:
    """Refuse a tracker whose package is missing, before anything is trained.

    Raises:
        UserError: naming the extra to install.
    """
    if name in EXTRAS and find_spec(name) is None:
        raise UserError(f"tracking.backends: {name} is not installed: pip install 'fastvideo-distillation[{name}]'")


class TensorBoard:
    """Event files in the run folder. Lines after ``purge_step`` of an earlier life of the run are hidden."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class Package:
    """``wandb`` or ``trackio``, which share this much of their interface."""

    def __init__(self, package: str, project: str, name: str) -> None:
        self._package: Any = import_module(package)
        self._package.init(project=project, name=name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._package.log(dict(metrics), step=step)

    def close(self) -> None:
        self._package.finish()


class Isolated:
    """One tracker in a thread of its own.

    Args:
        name: for the warning.
        make: opens it, with the first line, so that a refused run leaves nothing behind.
        warn: called once with the reason, when the tracker is dropped.
    """

    def __init__(self, name: str, make: Open, warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._lines: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(CAPACITY)
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand a line over; returns at once."""
        if self._dropped.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        if self._lines.full():
            self._drop(f"is {CAPACITY} lines behind")
        else:
            self._lines.put_nowait((metrics, step))

    def close(self) -> None:
        """Let it write what it holds, for :data:`GRACE` seconds."""
        if self._thread is None or self._dropped.is_set():
            return
        self._lines.put_nowait(None) if not self._lines.full() else self._drop("has not kept up")
        self._thread.join(GRACE)
        if self._thread.is_alive():
            self._drop(f"has not finished within {GRACE:g} s")

    def _work(self) -> None:
        with ExitStack() as fence:
            fence.push(self._failed)
            backend = self._make()
            while (line := self._lines.get()) is not None:
                backend.log(*line)
            backend.close()

    def _failed(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Stop every exception: trackers are foreign code and raise anything, even ``SystemExit``."""
        if error is not None:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._drop(f"failed ({type(error).__name__}: {first})")
        return True

    def _drop(self, why: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self._warn(f"tracker {self.name} {why}: it is dropped; metrics.jsonl has everything")
