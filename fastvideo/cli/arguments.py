"""Argument types that verbs share, and their parsing; no heavy imports, so that ``--help`` is instant."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
from annotated_types import Interval

from fastvideo.devices import check_device
from fastvideo.errors import UserError
from fastvideo.ranges import Frames, GuidanceScale, Pixels, Steps, Tokens
from fastvideo.sampling_ranges import WrittenRate
from fastvideo.wording import see

T = TypeVar("T")
FLATTENED_URL = re.compile(r"([a-z][a-z0-9+.-]+):/")
"""Beginning of a path that was made of a URL."""

INT = tyro.conf.arg(metavar="INT", help_behavior_hint="")
FLOAT = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")
OptionalPixels = Annotated[Pixels | None, INT]
OptionalFrames = Annotated[Frames | None, INT]
OptionalTokens = Annotated[Tokens | None, INT]
OptionalSteps = Annotated[Steps | None, INT]
OptionalRate = Annotated[WrittenRate | None, INT]
OptionalGuidance = Annotated[GuidanceScale | None, FLOAT]
OptionalPrecision = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    tyro.conf.arg(metavar="float32|bfloat16|float16", help_behavior_hint=""),
]
OptionalArithmetic = Annotated[
    Literal["float32", "bfloat16"] | None, tyro.conf.arg(metavar="float32|bfloat16", help_behavior_hint="")
]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OptionalPlace = Annotated[str | None, tyro.conf.arg(metavar="FILE|URL", help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def parse(arguments: type[T], argv: Sequence[str], verb: str) -> T:
    """Parse the arguments of a verb.

    Raises:
        UserError: for a number outside of its range, a URL in place of a path, or a device that is not here.
        SystemExit: after ``--help``, or for arguments that do not exist.
    """
    parsed = tyro.cli(arguments, args=list(argv), prog=f"fastvideo {verb}")
    check_ranges(parsed)
    _check_local(parsed)
    check_device(vars(parsed).get("device", "cpu"))
    return parsed


def _check_local(parsed: object) -> None:
    """Refuse a URL where only a path on a disk is possible: a folder of the name ``s3:`` would be made here."""
    for name, found in vars(parsed).items():
        for value in found if isinstance(found, tuple) else (found,):
            if isinstance(value, Path) and (flat := FLATTENED_URL.match(str(value))):
                url = f"{flat[1]}://{str(value)[flat.end() :]}"
                raise UserError(f"{name.replace('_', '-')}: {url} is a URL, and a path on a disk is expected")


def check_ranges(parsed: object) -> None:
    """Check every number against the range of its type.

    Raises:
        UserError: for one outside of it, with the flag and the range.
    """
    for name, hint in get_type_hints(type(parsed), include_extras=True).items():
        found = vars(parsed)[name]
        for value in found if isinstance(found, tuple) else (found,):
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(f"--{name.replace('_', '-')}", value, hint)


def check_number(name: str, value: float, hint: Any) -> None:
    """Check a number against the range of its type.

    Raises:
        UserError: naming the number and the range, if it is outside or not finite.
    """
    for interval in ranges_in(hint):
        if not holds(interval, value):
            raise UserError(f"{name} must be {shown(interval)}, got {value}{see('a-number-is-out-of-range')}")
    if not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")


def ranges_in(hint: Any) -> Iterator[Interval]:
    """Ranges in a type, at any depth."""
    yield from (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Interval))
    for inner in get_args(hint):
        yield from ranges_in(inner)


def shown(interval: Interval) -> str:
    """An interval in words: ``from 1 to 1000``, ``above 0, up to 1``."""
    low = f"from {interval.ge}" if interval.ge is not None else f"above {interval.gt}"
    joint = " to" if interval.ge is not None and interval.le is not None else ", up to"
    return f"{low}{joint} {interval.le}" if interval.le is not None else f"{low}, below {interval.lt}"


def holds(interval: Interval, value: float) -> bool:
    """True for a number in an interval; never for one that is no number."""
    above = value >= interval.ge if interval.ge is not None else value > interval.gt  # type: ignore[operator]
    below = value <= interval.le if interval.le is not None else value < interval.lt  # type: ignore[operator]
    return bool(above and below)
