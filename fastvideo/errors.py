"""Exceptions that are printed as a message, without a traceback."""

from __future__ import annotations

EXIT_USER_ERROR, EXIT_STALLED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 70, 75, 130
"""70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h: schedulers can restart a job after 75."""


class UserError(Exception):
    """A mistake in the user's input (config, folder, prompt): one clear message, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on: reason and remedy, exit code 1, no traceback."""
