"""How long a run took to come to the end of its first step, and where that time went."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastvideo.distillation.engine.tracking import Tracker

STARTUP = "startup.jsonl"
"""File of a run with one object per launch: seconds in all, and of each part."""


class StartUp:
    """A clock for what comes before steps, and a hook that speaks once, after the first one.

    Args:
        began: when the run was asked for, of :func:`time.monotonic`.
    """

    def __init__(self, began: float) -> None:
        self.began = self._since = began
        self.parts: dict[str, float] = {}
        self._tracker: Tracker | None = None

    def reached(self, part: str) -> None:
        """``part`` has just ended; it began where the one before it ended."""
        now = time.monotonic()
        self.parts[part], self._since = now - self._since, now

    def tell(self, tracker: Tracker) -> StartUp:
        """Say it there, after the next step."""
        self._tracker = tracker
        return self

    def due(self, step: int) -> bool:
        """Whether it is still to be said."""
        return self._tracker is not None

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Say it, once: the parts add up to the whole."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        self.reached("step")
        whole = self._since - self.began
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        tracker.say(f"first step after {whole:.1f} s ({parts})")
        rounded = {part: round(seconds, 3) for part, seconds in self.parts.items()}
        tracker.write_line(STARTUP, {"step": step, "seconds": round(whole, 3), "parts": rounded})
