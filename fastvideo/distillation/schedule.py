"""Few-step ladder: the noise levels at which a student runs.

Training, validation, generation and export share one object of real times in ``(0, 1]``. Published step lists and
shifts are converted once, when the config is parsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from fastvideo.distillation.noise import GuidanceValue, shift_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Fraction, GuidanceScale, NonNegativeFloat

TRAIN_STEPS = 1000
"""Discrete steps behind published integer timesteps (``1000`` means ``t = 1``)."""
MOST_STEPS = 10_000
"""Upper bound of a ladder's length."""


@dataclass(frozen=True)
class Ladder:
    """Decreasing times ``1 >= t_0 > t_1 > ... > t_{K-1} > 0``; the final 0 is implied.

    Raises:
        UserError: if the times are empty, not strictly decreasing, above 1 or not above 0.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        shown = list(self.times)
        if not self.times:
            raise UserError("ladder: at least one time is needed, for example [1.0, 0.75, 0.5, 0.25]")
        if self.times[0] > 1.0:
            steps = "give integer timesteps as `steps:` with their `shift:`"
            raise UserError(f"ladder {shown}: starts at {self.times[0]}, above 1 (pure noise); {steps}")
        if not all(math.isfinite(time) for time in self.times):
            raise UserError(f"ladder {shown}: every time must be a finite number")
        for high, low in zip(self.times, self.times[1:], strict=False):
            if low == high:
                raise UserError(f"ladder {shown}: repeats {low}; every time must be lower than the one before")
            if low > high:
                raise UserError(f"ladder {shown}: rises from {high} to {low}; times must decrease")
        if self.times[-1] <= 0.0:
            raise UserError(f"ladder {shown}: ends at {self.times[-1]}; the final 0 is implied, leave it out")

    @classmethod
    def from_steps(cls, steps: Sequence[float], *, shift: float = 1.0, warp: bool = True) -> Ladder:
        """Real times of a published step list; a trailing 0 is dropped.

        With ``warp`` the steps are unshifted and the scheduler warps them (``t = S s / (1 + (S - 1) s)``, ``s = step /
        1000``); otherwise they are final timesteps and ``shift`` does not act.
        """
        kept = [step for i, step in enumerate(steps) if not (step == 0 and i == len(steps) - 1)]
        return cls(tuple(_shifted(step / TRAIN_STEPS, shift) if warp else step / TRAIN_STEPS for step in kept))

    @classmethod
    def uniform(cls, count: int, *, shift: float = 1.0) -> Ladder:
        """Times of ``count`` Euler steps from 1, uniform before the shift; UserError above ``MOST_STEPS``."""
        if count > MOST_STEPS:
            raise UserError(f"count {count} is more than {MOST_STEPS} steps")
        return cls(tuple(_shifted(1.0 - i / count, shift) for i in range(count)))

    def __len__(self) -> int:
        return len(self.times)

    @property
    def with_end(self) -> tuple[float, ...]:
        """Times with the final 0."""
        return (*self.times, 0.0)

    def joined(self, other: Ladder, tolerance: float = 1e-6) -> Ladder:
        """Times of both ladders; of two nearer than ``tolerance``, the one of ``other``."""
        own = [t for t in self.times if all(abs(t - kept) > tolerance for kept in other.times)]
        return Ladder(tuple(sorted((*own, *other.times), reverse=True)))

    def first(self, count: int) -> Ladder:
        """Ladder of ``count`` calls, which must be 1 (the first time) or ``len(self)``, as trained; else UserError."""
        if count in (1, len(self)):
            return Ladder(self.times[:count])
        raise UserError(
            f"this student was trained for the ladder {list(self.times)}: it runs with --steps {len(self.times)} "
            f"or --steps 1, not {count}; name other times yourself: --ladder 1.0 0.5"
        )


def _shifted(time: float, shift: float) -> float:
    """``shift_time`` that keeps 1 exact; rounding gives 1.0000000000000002 for some shifts, such as 0.2."""
    return time if time == 1.0 else shift_time(time, shift)


CONVENTIONS = {"standard": 0.0, "extra": 1.0}
"""Addition to the number of each convention that makes it standard."""
MOST = 1000.0
"""Largest guidance."""
ByTime = tuple[tuple[Fraction, GuidanceScale], ...]
"""Pairs ``(t, g)``, falling in ``t`` to 0: the guidance from each time up to the one before."""


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


def guidance_text(guidance: GuidanceValue) -> str:
    """Guidance for people: ``4.5``, ``4 from 0.875 up, 3 below``."""
    if not isinstance(guidance, tuple):
        return f"{guidance:g}"
    parts = [f"{g:g} from {start:g} up" for start, g in guidance[:-1]]
    return f"{', '.join(parts)}, {guidance[-1][1]:g} below"


def _checked(shares: tuple[float, ...]) -> tuple[float, ...]:
    if shares and not any(shares):
        raise ValueError(f"at least one ladder step needs a share above 0, got {list(shares)}")
    return shares


Shares = Annotated[tuple[NonNegativeFloat, ...], AfterValidator(_checked)]
"""Shares of the ladder's steps, the noisiest first; they need not sum to 1, and none at all are equal ones."""


class Rungs:
    """Draws ladder steps by shares.

    Raises:
        UserError: if the number of shares is not the ladder's length; ``field`` of the method has them.
    """

    def __init__(self, shares: Sequence[float], ladder: Ladder, field: str = "rung_shares") -> None:
        self.shares, self.ladder = tuple(shares), ladder
        if shares and len(shares) != len(ladder):
            times = ", ".join(f"{t:g}" for t in ladder.times)
            raise UserError(f"method.{field}: {len(shares)} shares for a ladder of {len(ladder)} steps ({times})")

    def stop(self, rng: RandomStreams) -> int:
        """Ladder index at which a simulated rollout stops, equal on all ranks."""
        return rng.shared_choice(self.shares) if self.shares else rng.shared_index(len(self.ladder))

    def times(self, count: int, rng: RandomStreams) -> Tensor:
        """Float32 ``[count]``: a ladder time per sample."""
        index = rng.choice(count, self.shares) if self.shares else rng.index(count, len(self.ladder))
        return torch.tensor(self.ladder.times, device=index.device)[index]
