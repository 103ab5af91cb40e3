"""A student's ladder as the config of a stock scheduler, for families whose network is a rectified flow.

diffusers' ``FlowMatchEulerDiscreteScheduler`` does both things that a few-step student needs. With
``stochastic_sampling`` it re-noises the clean estimate as ``rollout.renoise`` does, else it takes Euler steps; and
``shift`` with ``shift_terminal`` gives it a grid from 1 down to the last step. With ``d`` the spacing of its unshifted
grid that is ``1 - t_i = a i / (1 - b i)``, where ``b = d (S - 1) / S`` and ``a`` puts the last time on
``shift_terminal``. A uniform ladder under any shift has this form too, so it is met exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvideo.distillation.adapters.export.base import Exporter, StockSampler, deviation
from fastvideo.distillation.types import UserError

TRAIN_TIMESTEPS = 1000
"""The scheduler's unit of time, and 1 over the smallest time of its unshifted grid."""
SMALLEST = 1 / TRAIN_TIMESTEPS
CANDIDATES = 129
"""Bends that are tried between the least and the largest that a ladder step asks for."""
REACHABLE = 0.93
"""Largest bend of the whole grid: the scheduler shifts its end point too, which takes back what a larger shift adds."""


class FlowMatchExporter(Exporter):
    """A family whose network is a rectified flow."""

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """:func:`flow_match_sampler`."""
        return flow_match_sampler(times, kind)


def flow_match_sampler(times: Sequence[float], kind: str) -> StockSampler:
    """The ``FlowMatchEulerDiscreteScheduler`` that comes closest to a ladder, with the times that it really yields.

    Args:
        times: decreasing times in ``(0, 1]``. The scheduler starts at 1 and ends on the last time; ladders of up to
            three steps that start at 1, and uniform ladders under any shift, are met to float32.
        kind: ``renoise`` or ``euler``.

    Raises:
        UserError: for a sampler that this scheduler does not have.
    """
    if kind not in ("renoise", "euler"):
        raise UserError(f"sampler {kind!r} has no stock counterpart: diffusers offers renoise and euler for flows")
    if len(times) == 1:  # a terminal would make the scheduler divide by zero: its first time is its last
        return _sampler(1, 1.0, None, kind)
    shifts = sorted({_shift(bend) for bend in _bends(times)})
    samplers = [_sampler(len(times), shift, times[-1], kind) for shift in shifts]
    return min(samplers, key=lambda sampler: deviation(sampler.times, times))


def yielded_times(scheduler: Any, steps: int) -> tuple[float, ...]:
    """The times at which a scheduler calls the network for that many steps; the final 0 is left out."""
    scheduler.set_timesteps(steps)
    return tuple(float(sigma) for sigma in scheduler.sigmas[:-1])


def _sampler(steps: int, shift: float, terminal: float | None, kind: str) -> StockSampler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        shift=shift,
        shift_terminal=terminal,
        stochastic_sampling=kind == "renoise",
    )
    return StockSampler(scheduler, yielded_times(scheduler, steps))


def _bends(times: Sequence[float]) -> Sequence[float]:
    """Values of ``b (K - 1)`` to try: from the least to the largest that an inner ladder step asks for.

    The largest deviation is quasi-convex in ``b`` (each step's is monotone and changes sign at the ``b`` it asks for),
    so the best lies between them. Step ``i`` asks for ``b = (1 - r) / (K - 1 - r i)`` with
    ``r = (1 - t_i) (K - 1) / ((1 - t_{K-1}) i)``.
    """
    last = len(times) - 1
    if last == 1:
        return [0.0]
    numbers = np.arange(1, last)
    ratio = (1 - np.asarray(times[1:last])) * last / ((1 - times[-1]) * numbers)
    asked = (1 - ratio) / (last - ratio * numbers) * last
    return np.linspace(asked.min(), asked.max(), CANDIDATES).clip(max=REACHABLE).tolist()  # type: ignore[no-any-return]


def _shift(bend: float) -> float:
    """The shift ``S`` whose grid has ``b (K - 1) = bend``.

    The scheduler shifts the end of its unshifted grid as well, to ``m = S e / (1 + (S - 1) e)`` with ``e`` =
    :data:`SMALLEST`; ``(S - 1) (1 - m) / S = bend`` is quadratic in ``S``, and the root that tends to 1 as ``bend``
    tends to 0 is wanted.
    """
    square, linear, constant = bend * SMALLEST, bend * (1 - SMALLEST) - (1 - SMALLEST), 1 - SMALLEST
    return float(2 * constant / (-linear + np.sqrt(linear**2 - 4 * square * constant)))
