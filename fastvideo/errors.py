"""The one exception that is for the user."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave (config, folder, prompt): one clear message, exit code 2, no traceback."""
