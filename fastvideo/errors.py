"""The exceptions that are for the user: a message, no traceback."""

from __future__ import annotations

import signal

EXIT_USER_ERROR, EXIT_STALLED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 70, 75, 130
"""70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h: schedulers can be told to start a job again after 75."""


class UserError(Exception):
    """A mistake in what the user gave (config, folder, prompt): one clear message, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on, with the reason and what to do; exit code 1, no traceback."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did at a safe point.

    Args:
        number: of the signal.
        message: what was saved.
    """

    def __init__(self, number: int, message: str = "in preparation, before a step was taken; start it again") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 for what a scheduler sends."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_PREEMPTED
