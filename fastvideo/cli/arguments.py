"""Argument types that verbs share, and their parsing; no heavy imports, so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import tyro

from fastvideo.errors import UserError

T = TypeVar("T")

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


class _AtLeastOne:
    """Marks a number that :func:`parse` checks."""


AT_LEAST_ONE = _AtLeastOne()
Count = Annotated[int, AT_LEAST_ONE]


def parse(arguments: type[T], argv: Sequence[str], verb: str) -> T:
    """Parse the arguments of a verb.

    Raises:
        UserError: for a :data:`Count` below 1.
        SystemExit: after ``--help``, or for arguments that do not exist.
    """
    parsed = tyro.cli(arguments, args=list(argv), prog=f"fastvideo {verb}")
    check_counts(parsed)
    return parsed


def check_counts(parsed: object) -> None:
    """Check every :data:`Count`.

    Raises:
        UserError: for one below 1.
    """
    for name, hint in get_type_hints(type(parsed), include_extras=True).items():
        if AT_LEAST_ONE in getattr(hint, "__metadata__", ()) and vars(parsed)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {vars(parsed)[name]}")
