"""Exceptions that are printed as a message, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

PACKAGE, PAGE = Path(__file__).parent, "troubleshooting.md"
EXIT_USER_ERROR, EXIT_STALLED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 70, 75, 130
"""70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h: schedulers can restart a job after 75."""


class UserError(Exception):
    """A mistake in the user's input (config, folder, prompt): one clear message, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on: reason and remedy, exit code 1, no traceback."""


def see(anchor: str) -> str:
    """The end of a message that has an entry in the page on troubleshooting, which a wheel carries too."""
    clone = PACKAGE.parent / "docs" / PAGE
    return f" (see {f'docs/{PAGE}' if clone.is_file() else PACKAGE / PAGE}#{anchor})"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word nearest to ``word``, preferring one that it abbreviates; ``None`` if none is near.

    ``student_lr`` is ``student_learning_rate`` and not ``student_betas``.
    """
    near = difflib.get_close_matches(word, list(known), n=5)
    return next((one for one in near if _abbreviates(word, one)), near[0] if near else None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word; empty if no known one is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def _abbreviates(word: str, whole: str) -> bool:
    letters = iter(whole)
    return all(letter in letters for letter in word)


def counted(count: int, noun: str) -> str:
    """``1 process``, ``2 processes``, ``3 samples``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"
