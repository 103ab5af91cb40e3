"""Averages under power functions of the update, and any of them out of a few (Karras et al., arXiv 2312.02696).

A profile weighs the weights after update ``u`` of ``t`` with ``(u / t) ** exponent``. It is named by the standard
deviation of its mass over ``t`` (sigma_rel of the paper), so that a name means the same for runs of every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_STDS = (0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25)
"""Widths among which an average is chosen, from the steepest that .05 and .1 give with little noise."""


@dataclass(frozen=True)
class Profile:
    """A power function up to an update, with its relative standard deviation."""

    update: int
    std: float


@dataclass(frozen=True)
class Fit:
    """Coefficients of stored profiles whose sum is nearest to a wanted one.

    Attributes:
        coefficients: by profile; they sum to 1.
        error: norm of what is missed over that of the wanted profile, as functions of the update.
        noise: norm of the coefficients: the growth of rounding errors of the stored weights.
    """

    coefficients: dict[Profile, float]
    error: float
    noise: float


def exponent_of(std: float) -> float:
    """The exponent of the power function with this relative standard deviation, below 0.2886 (equation 126)."""
    square = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real.max())


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Least squares over functions of the update; a stored profile is taken alone, and later ones do not help."""
    if wanted in stored:
        return Fit({wanted: 1.0}, 0.0, 1.0)
    known = [profile for profile in stored if profile.update <= wanted.update]
    among, towards = _overlaps(known, known), _overlaps(known, [wanted])[:, 0]
    solved = np.linalg.lstsq(among, towards, rcond=None)[0]
    solved /= solved.sum()
    own = _overlaps([wanted], [wanted])[0, 0]
    missed = max(float(solved @ among @ solved - 2 * solved @ towards + own), 0.0)
    return Fit(
        dict(zip(known, solved.tolist(), strict=True)), float((missed / own) ** 0.5), float(np.linalg.norm(solved))
    )


def _overlaps(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """Scalar products of profiles, ``[rows, columns]`` (equation 151)."""
    t_a, a = (np.array([get(row) for row in rows])[:, None] for get in (_update, _exponent))
    t_b, b = (np.array([get(column) for column in columns])[None] for get in (_update, _exponent))
    ratio = (t_a / t_b) ** np.where(t_a < t_b, b, -a)
    return np.asarray((a + 1) * (b + 1) * ratio / ((a + b + 1) * np.maximum(t_a, t_b)))


def _update(profile: Profile) -> float:
    return float(profile.update)


def _exponent(profile: Profile) -> float:
    return exponent_of(profile.std)
