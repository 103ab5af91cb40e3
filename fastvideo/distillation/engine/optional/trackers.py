"""External trackers, each behind a bounded queue and a daemon thread: what raises, hangs or has no network is left out.

Nothing here is waited for while training; at the end each tracker has :data:`GRACE` seconds to write what it holds.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fastvideo.distillation.types import UserError

CAPACITY = 256
"""Lines that may wait; a tracker that is further behind is left out."""
GRACE = 5.0
"""Seconds that a tracker has at the end."""


class Backend(Protocol):
    """Something that keeps metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep one line."""
        ...

    def close(self) -> None:
        """Write what is still held."""
        ...


Open = Callable[[], Backend]
"""Makes a backend; it may take long, ask a server, or fail: it runs in the backend's thread."""


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


EXTRAS = ("wandb", "trackio")
"""Trackers that are an optional dependency of the same name."""


def check_installed(name: str) -> None:
    """Refuse a tracker whose package is not there, before anything is trained.

    Raises:
        UserError: naming the extra to install.
    """
    if name in EXTRAS and find_spec(name) is None:
        raise UserError(f"tracking.backends: {name} is not installed: pip install 'fastvideo-distillation[{name}]'")


class Isolated:
    """One tracker in a thread of its own.

    Args:
        name: for the warning.
        make: opens it, with the first line, so that a refused run leaves nothing behind.
        warn: told once why the tracker is left out.
    """

    def __init__(self, name: str, make: Open, warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._lines: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(CAPACITY)
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand a line over; returns at once."""
        if self._given_up.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        if self._lines.full():
            self._give_up(f"is {CAPACITY} lines behind")
        else:
            self._lines.put_nowait((metrics, step))

    def close(self) -> None:
        """Let it write what it holds, for :data:`GRACE` seconds."""
        if self._thread is None or self._given_up.is_set():
            return
        self._lines.put_nowait(None) if not self._lines.full() else self._give_up("has not kept up")
        self._thread.join(GRACE)
        if self._thread.is_alive():
            self._give_up(f"has not finished within {GRACE:g} s")

    def _work(self) -> None:
        with _Fence(self._give_up):
            backend = self._make()
            while (line := self._lines.get()) is not None:
                backend.log(*line)
            backend.close()

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            self._warn(f"tracker {self.name} {why}: it is left out from here on; metrics.jsonl has everything")


class _Fence:
    """Whatever is raised inside ends there, and is told to ``report``: trackers are not ours and raise anything."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._report(f"failed ({type(error).__name__}: {first})")
        return True
