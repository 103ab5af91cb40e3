"""The exceptions that are for the user: a message, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave (config, folder, prompt): one clear message, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on, with the reason and what to do; exit code 1, no traceback."""
