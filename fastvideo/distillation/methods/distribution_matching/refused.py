"""Options of DMD2 that a method built on it does not support."""

from __future__ import annotations

from typing import TypeVar

from pydantic import AfterValidator

T = TypeVar("T")


def refused(reason: str, only: str = "false") -> AfterValidator:
    """Validator that refuses an option of DMD2 in a method that does not support it."""

    def check(value: T) -> T:
        if value:
            raise ValueError(f"must be {only} for this method: {reason}")
        return value

    return AfterValidator(check)
