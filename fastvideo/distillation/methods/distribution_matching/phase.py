"""Diffusion of samples that already have the noise of a time ``s`` (Phased DMD, arXiv 2510.27684).

``x_s = (1 - s) x0 + s noise`` goes on to a time ``t > s`` as ``x_t = a x_s + b e`` with fresh noise ``e``, where
``a = (1 - t) / (1 - s)`` and ``b^2 = t^2 - a^2 s^2``: its distribution is that of clean samples at ``t``. So a
network's velocity is the same function, and the clean sample is not needed to learn it. At ``s = 0`` all is rectified
flow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvideo.distillation.experts import boundary_between, same_steps
from fastvideo.distillation.noise import expand_time, shift_time
from fastvideo.distillation.types import UserError


def boundary_of_phases(
    student: float | None, scoring: float | None, given: float | None, times: tuple[float, ...]
) -> float:
    """The time between two phases: that of the student's experts, else the given one, else in the middle of the ladder.

    Where no step of the ladder lies between it and that of the scoring experts, theirs is taken, unless another one is
    given: the student's calls are the same, and each phase is scored by one expert. So a student that was saved with
    the boundary half-way between two steps goes on.

    Args:
        student: boundary of the student's experts, ``None`` for one network.
        scoring: that of teacher and critic.
        given: ``method.boundary``.
        times: the ladder.

    Raises:
        UserError: if another boundary is given than the student's.
    """
    if student is not None and given not in (None, student):
        raise UserError(f"method.boundary: {given:g}, but the student's experts change at {student:g}; leave it out")
    if student is None and given is not None:
        return given
    chosen = boundary_between(times, times[len(times) // 2 - 1]) if student is None else student
    return scoring if scoring is not None and same_steps(times, scoring, chosen) else chosen


def within(u: Tensor, low: float, high: float, shift: float) -> Tensor:
    """Times ``[B]`` of uniform draws ``u``, distributed as shifted uniform ones that fall into ``[low, high]``."""
    start, end = shift_time(low, 1 / shift), shift_time(high, 1 / shift)
    return shift_time(start + (end - start) * u, shift).clamp(low, high)


@dataclass(frozen=True)
class Phase:
    """Noise levels above ``start``, the ``s`` of the formulas; times ``t`` are float32 ``[B]``, above it, at most 1."""

    start: float

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` at ``t``."""
        a = (1 - t) / (1 - self.start)
        return a, (t.square() - (a * self.start).square()).sqrt()

    def _share(self, t: Tensor) -> Tensor:
        """``(t - b^2) / (1 - t)``, without a difference of nearly equal numbers: 1 times ``t`` at ``s = 0``."""
        return t + (1 - t) * (self.start / (1 - self.start)) ** 2

    def add_noise(self, x_s: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = a x_s + b e``."""
        a, b = (expand_time(value, x_s) for value in self.coefficients(t))
        return a * x_s + b * noise

    def velocity_target(self, x_s: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Target whose mean at every ``x_t`` is the velocity: ``-x_s / (1 - s) + (t - b^2) / (b (1 - t)) e``.

        Its variance grows as ``t`` comes down to ``s``, since the factor of ``e`` does.
        """
        factor = expand_time(self._share(t) / self.coefficients(t)[1], x_s)
        return factor * noise - x_s / (1 - self.start)

    def estimate(self, x_t: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """``E[x_s | x_t]`` of a velocity; its differences are those of scores at ``x_t``, times ``b^2 / a``."""
        share, b = expand_time(self._share(t), x_t), expand_time(self.coefficients(t)[1], x_t)
        return (1 - self.start) * (share * x_t - b.square() * u) / expand_time(t, x_t)
