"""Guidance: one number, or one that depends on the noise level, as two experts are sampled with (Wan 2.2 A14B).

Standard convention: 1 is the conditional prediction.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor

from fastvideo.ranges import Fraction, GuidanceScale

CONVENTIONS = {"standard": 0.0, "extra": 1.0}
"""Addition to the number of each convention that makes it standard."""
MOST = 1000.0
"""Largest guidance."""
ByTime = tuple[tuple[Fraction, GuidanceScale], ...]
"""Pairs ``(t, g)``, falling in ``t`` to 0: the guidance from each time up to the one before."""

GuidanceValue = float | ByTime
"""Guidance of samplers and of teachers."""


def standard_guidance(value: object) -> object:
    """Convert guidance to the standard convention: a number or ``{"standard": g}`` is ``g``, ``{"extra": w}`` 1 + w."""
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or next(iter(value)) not in CONVENTIONS:
        raise ValueError(f"guidance is a number or one of {{standard: g}}, {{extra: w}}; got {value}")
    convention, number = next(iter(value.items()))
    if not isinstance(number, (int, float)):
        raise ValueError(f"guidance: {convention} needs a number, got {number!r}")
    return float(number) + CONVENTIONS[convention]


def by_time(value: object) -> GuidanceValue:
    """Convert a guidance, or pairs ``[[t, g], ...]``, to the standard convention; pairs that all agree are a number."""
    if not isinstance(value, (list, tuple)):
        return _scale(value)
    if not value or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise ValueError(f"guidance by time is a list of pairs such as [[0.875, 4.0], [0, 3.0]]; got {value!r}")
    pairs = tuple((_number(start), _scale(g)) for start, g in value)
    starts = [start for start, _ in pairs]
    if starts != sorted(set(starts), reverse=True) or starts[-1] != 0.0 or starts[0] > 1.0:
        raise ValueError(f"guidance by time: the times must fall from at most 1 to 0, got {starts}")
    numbers = {g for _, g in pairs}
    return numbers.pop() if len(numbers) == 1 else pairs


def _scale(value: object) -> float:
    number = _number(standard_guidance(value))
    if not 0.0 <= number <= MOST:
        raise ValueError(f"guidance must be from 0 to {MOST:g}, got {number}")
    return number


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"guidance is a number, or a list of pairs [t, g] of numbers, got {value!r}")
    return float(value)


Guidance = Annotated[GuidanceScale | ByTime, BeforeValidator(by_time)]
"""Guidance as a config field, of samplers and of teachers: a number or pairs by time."""
GuidanceNumber = Annotated[GuidanceScale, BeforeValidator(standard_guidance)]
"""Guidance that is the same at all times."""


def guidance_at(guidance: GuidanceValue, t: Tensor) -> float | Tensor:
    """Guidance at times ``t`` ``[B]`` or ``[B, F]``: the number itself, or one for each time."""
    if not isinstance(guidance, tuple):
        return guidance
    found = torch.full_like(t, guidance[-1][1])
    for start, value in reversed(guidance[:-1]):
        found = torch.where(t >= start, value, found)
    return found


def guidance_text(guidance: GuidanceValue) -> str:
    """Guidance for people: ``4.5``, ``4 from 0.875 up, 3 below``."""
    if not isinstance(guidance, tuple):
        return f"{guidance:g}"
    parts = [f"{g:g} from {start:g} up" for start, g in guidance[:-1]]
    return f"{', '.join(parts)}, {guidance[-1][1]:g} below"
