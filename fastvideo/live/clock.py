"""Play-out clock: how many frames are made and not yet shown, and how long to wait before the next chunk."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAD = 2
"""Chunks that are made ahead of the one that plays. More would only delay a new prompt."""


class Clock:
    """Play-out of a stream at a fixed rate.

    The pages show frames at this rate from the moment that they arrive, so nobody has to report what has been shown.

    Args:
        fps: frames per second.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, fps: float, now: Callable[[], float] = time.monotonic) -> None:
        self.fps, self._now = fps, now
        self._end = now()
        self._chunk = 1

    def arrived(self, frames: int) -> None:
        """Count a chunk that is ready to be shown."""
        now = self._now()
        self._end = max(self._end, now) + frames / self.fps
        self._chunk = max(self._chunk, frames)

    @property
    def ahead(self) -> float:
        """Frames that are made and not yet shown."""
        return max(0.0, self._end - self._now()) * self.fps

    @property
    def full(self) -> int:
        """Frames of a full buffer."""
        return LEAD * self._chunk

    @property
    def wait(self) -> float:
        """Seconds until there is room for another chunk in the buffer."""
        return max(0.0, (self.ahead - (LEAD - 1) * self._chunk) / self.fps)
