"""Ladders from what papers publish: a step list, or a number of uniform steps, with a shift."""

from __future__ import annotations

from collections.abc import Sequence

from fastvideo.distillation.noise import shift_time
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import UserError

TRAIN_STEPS = 1000
"""Discrete steps behind published integer timesteps (``1000`` means ``t = 1``)."""
MOST_STEPS = 10_000
"""Upper bound of a ladder's length."""


def published_ladder(steps: Sequence[float], *, shift: float = 1.0, warp: bool = True) -> Ladder:
    """Real times of a published step list; a trailing 0 is dropped.

    With ``warp`` the steps are unshifted and the scheduler warps them (``t = S s / (1 + (S - 1) s)``, ``s = step /
    1000``); otherwise they are final timesteps and ``shift`` does not act.
    """
    kept = [step for i, step in enumerate(steps) if not (step == 0 and i == len(steps) - 1)]
    return Ladder(tuple(_shifted(step / TRAIN_STEPS, shift) if warp else step / TRAIN_STEPS for step in kept))


def uniform_ladder(count: int, *, shift: float = 1.0) -> Ladder:
    """Times of ``count`` Euler steps from 1, uniform before the shift; UserError above ``MOST_STEPS``."""
    if count > MOST_STEPS:
        raise UserError(f"count {count} is more than {MOST_STEPS} steps")
    return Ladder(tuple(_shifted(1.0 - i / count, shift) for i in range(count)))


def _shifted(time: float, shift: float) -> float:
    """``shift_time`` that keeps 1 exact; rounding gives 1.0000000000000002 for some shifts, such as 0.2."""
    return time if time == 1.0 else shift_time(time, shift)
