"""Exceptions that are printed as a message, without a traceback."""

from __future__ import annotations

import signal

EXIT_USER_ERROR, EXIT_STALLED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 70, 75, 130
"""70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h: schedulers can restart a job after 75."""


class UserError(Exception):
    """A mistake in the user's input (config, folder, prompt): one clear message, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on: reason and remedy, exit code 1, no traceback."""


class Stopped(Exception):
    """A run that a signal stopped at a safe point.

    Args:
        number: of the signal.
        message: step and saved checkpoint.
    """

    def __init__(self, number: int, message: str = "in preparation, before a step was taken; start it again") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 for a scheduler's signal."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_PREEMPTED
