"""Time to first step, by phase."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastvideo.distillation.engine.tracking import Tracker


class StartUp:
    """A clock for everything before the first step, and a hook that logs it once, after that step.

    Writes ``startup.jsonl`` in the run's folder: one object per launch with the seconds in all, and of each phase.

    Args:
        began: launch time of the run (:func:`time.monotonic`).
    """

    def __init__(self, began: float) -> None:
        self.began = self._since = began
        self.phases: dict[str, float] = {}
        self._tracker: Tracker | None = None

    def reached(self, phase: str) -> None:
        """End ``phase``, which began where the one before it ended."""
        now = time.monotonic()
        self.phases[phase], self._since = now - self._since, now

    def report_to(self, tracker: Tracker) -> StartUp:
        """Log the startup times there after the first step."""
        self._tracker = tracker
        return self

    def due(self, step: int) -> bool:
        """True until the times are logged."""
        return self._tracker is not None

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Log the times once; the phases add up to the whole."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        self.reached("step")
        whole = self._since - self.began
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        tracker.say(f"first step after {whole:.1f} s ({phases})")
        rounded = {phase: round(seconds, 3) for phase, seconds in self.phases.items()}
        tracker.write_line("startup.jsonl", {"step": step, "seconds": round(whole, 3), "parts": rounded})
