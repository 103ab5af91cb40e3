"""Words of messages: the nearest right one, singular and plural, sizes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` most likely stands for, an abbreviated one before others; ``None`` if none is near.

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


def readable_size(count: float) -> str:
    """Size of a file: bytes in the decimal unit that suits them."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def gib(value: float) -> str:
    """Size of memory: bytes in GiB, or in MiB below a tenth of one."""
    return f"{value / 2**30:.2f} GiB" if value >= 0.1 * 2**30 else f"{value / 2**20:.2f} MiB"
