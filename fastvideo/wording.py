"""Words of messages and titles: counts, the nearest known word, and the entry of the page on troubleshooting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

PACKAGE, PAGE = Path(__file__).parent, "troubleshooting.md"


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


def title_of(name: str) -> str:
    """A method or family in a title: ``DMD2`` for ``dmd2``, the class of ``papers.sid:SiDMethod`` as it is written."""
    return name.rpartition(":")[2] if ":" in name else name.upper()


def counted(count: int, noun: str) -> str:
    """``1 process``, ``2 processes``, ``3 samples``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"
