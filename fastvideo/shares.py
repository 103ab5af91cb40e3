"""Shares of work that several machines do: each takes every N-th item."""

from __future__ import annotations

from dataclasses import dataclass

from fastvideo.errors import UserError


@dataclass(frozen=True)
class Share:
    """Every ``count``-th item, from ``index`` (1 to ``count``); all of them by default."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str, flag: str = "--shard") -> Share:
        """Read ``I/N``, the value of ``flag``.

        Raises:
            UserError: if it is something else.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(f"{flag} {text}: I/N is expected, with I from 1 to N, such as 3/16")
        return cls(int(index), int(count))

    def __contains__(self, number: int) -> bool:
        """True if the item of a number, from 0, is in this share."""
        return number % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALONE = Share()
