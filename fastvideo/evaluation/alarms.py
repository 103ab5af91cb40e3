"""Alarms of a training: figures of the student's videos outside their bands around those of a reference.

The reference is the teacher's videos of the same prompts, or real ones. An alarm is a sentence with a number and a
remedy. Consequences of a worse finding raise no alarm: the seeds of an exploding student, for example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastvideo.distillation.config.schema import HealthConfig

FAINT = 1e-3
"""Contrast and motion below this count as none; nothing is divided by less."""
Figures = Mapping[str, float]
Band = tuple[float, float]
"""Lowest and highest healthy value."""
_BANDS: dict[str, tuple[str, Callable[[Any], Band]]] = {
    "contrast": ("contrast", lambda ratios: (ratios[0], math.inf)),
    "saturation": ("saturation", lambda ratios: (ratios[0], ratios[1])),
    "motion": ("motion", lambda ratios: (ratios[0], ratios[1])),
    "late_motion": ("late_motion", lambda least: (least, math.inf)),
    "late_brightness": ("late_brightness", lambda ratios: (ratios[0], ratios[1])),
    "brightness": ("brightness", lambda most: (-most, most)),
    "colour": ("colour", lambda most: (-most, most)),
    "grid": ("grid", lambda most: (0.0, most)),
    "diversity": ("diversity", lambda least: (least, math.inf)),
    "latent_std": ("latent_std", lambda most: (0.0, most)),
    "update_balance": ("update_balance", lambda least: (least, math.inf)),
    "dmd_gradient_rms": ("gradient", lambda most: (0.0, most)),
    "critic_lag": ("critic_lag", lambda most: (0.0, most)),
}
"""By figure: the field of ``HealthConfig``, and its value as a band."""
_RATIOS = (*("contrast", "saturation", "motion", "late_motion", "late_brightness", "grid", "diversity", "latent_std"),)
DIFFERENCES = ("brightness", "latent_mean", "colour")
"""Figures compared by difference; the others by ratio."""


@dataclass(frozen=True)
class Alarm:
    """A short name, and a sentence with the number and a remedy."""

    name: str
    text: str


def bands(limits: Mapping[str, Any]) -> dict[str, Band]:
    """Healthy values of the figures of :func:`compare` and of the training.

    Args:
        limits: fields of ``HealthConfig``; figures of absent fields have no band.
    """
    return {name: band(limits[key]) for name, (key, band) in _BANDS.items() if key in limits}


def compare(live: Figures, reference: Figures) -> dict[str, float]:
    """Ratios to the reference; differences for ``brightness``, ``latent_mean`` and ``colour``, the worst channel's."""
    differences = {name: live[name] - reference[name] for name in ("brightness", "latent_mean") if name in live}
    channels = [live[name] - reference[name] for name in ("red", "green", "blue")]
    ratios = {
        name: live[name] / reference[name] for name in _RATIOS if name in live and reference.get(name, 0.0) > FAINT
    }
    return {**ratios, **differences, "colour": max(channels, key=abs)}


class _Rule(NamedTuple):
    """Alarm of a figure below its band (``low``), above it (``high``), or either (``both``)."""

    figure: str
    side: str
    name: str
    text: str


_FATAL = (
    _Rule(
        *("latent_std", "high", "exploding"),
        "the spread of the student's latents is {percent}: it is exploding. Lower its learning rate.",
    ),
    _Rule(
        *("contrast", "low", "washed out"),
        "contrast is {percent}: the student is washing out to a flat picture. Give the critic more updates per student "
        "update, or go back to an earlier checkpoint and lower the student's learning rate.",
    ),
)
"""The first of these silences all others."""
_RULES = (
    _Rule(
        *("motion", "low", "freezing"),
        "motion is {percent}: the student is freezing. Users of DMD2 lower the guidance or raise the score times (a "
        "higher method.score_time_shift), where motion is decided.",
    ),
    _Rule(
        *("motion", "high", "flickering"),
        "motion is {percent}: the student flickers. Lower its learning rate.",
    ),
    _Rule(
        *("late_motion", "low", "motion decays"),
        "motion of the last quarter over that of the first is {percent}: it dies down in the course of a video. "
        "Train on longer streams of the student's own, or go back to an earlier checkpoint.",
    ),
    _Rule(
        *("late_brightness", "both", "brightness drifts"),
        "brightness of the last quarter over that of the first is {percent}: it drifts in the course of a "
        "video. Train on the student's own streams (self_forcing), or lower the teacher's guidance.",
    ),
    _Rule(
        *("saturation", "high", "over-saturated"),
        "saturation is {percent}: the student is over-saturated. Lower the teacher's guidance, or stop at an earlier "
        "checkpoint.",
    ),
    _Rule(
        *("saturation", "low", "grey"),
        "saturation is {percent}: the student loses its colours. Raise the guidance.",
    ),
    _Rule(
        *("colour", "both", "tint"),
        "a colour channel is {points} points off the reference's: the student takes on a tint. Lower its learning "
        "rate, or raise the EMA's decay.",
    ),
    _Rule(
        *("brightness", "both", "brightness"),
        "brightness is {points} points off the reference's: the student gets {way}. Lower its learning rate, or give "
        "the critic more updates.",
    ),
    _Rule(
        *("grid", "high", "grid"),
        "steps at block borders are {percent}: a grid shows. The critic cannot keep up: raise its learning rate or "
        "method.generator_update_interval.",
    ),
    _Rule(
        *("diversity", "low", "same for all seeds"),
        "the difference between seeds is {percent}: the student makes the same video for all of them. Lower the "
        "guidance, or add a discriminator.",
    ),
    _Rule(
        *("update_balance", "low", "slow critic"),
        "per step the critic moves {value} times as far as the student, which it must follow: raise its learning rate "
        "or method.generator_update_interval.",
    ),
    _Rule(
        *("dmd_gradient_rms", "high", "gradient"),
        "the RMS of the DMD gradient is {value} where about 1 is usual: teacher and critic disagree more than the "
        "student is wrong. Warm up the critic, or lower the guidance.",
    ),
    _Rule(
        *("critic_lag", "high", "late critic"),
        "the critic's error in the last chunk is {value} times that in the first: it lags behind the student where "
        "streams get long, and grids begin there. Raise its learning rate or method.generator_update_interval.",
    ),
)
_TINTING = {"over-saturated", "grey"}
"""Alarms that cause a tint, so that it raises none of its own."""


def find_alarms(live: Figures, reference: Figures | None, training: Figures, limits: HealthConfig) -> list[Alarm]:
    """Find the alarms of one validation.

    Args:
        live: figures of the student, from :func:`fastvideo.evaluation.health.measure`.
        reference: of the teacher or of real videos; ``None`` checks only finiteness and ``training``.
        training: ``update_balance`` (movement of the critic per step over the student's), ``dmd_gradient_rms``
            and ``critic_lag`` (its error in the last chunk over that in the first), as far as the method has them.
    """
    if not all(math.isfinite(value) for value in live.values()):
        return [Alarm("exploding", "the student's videos are not finite: it is exploding. Lower the learning rates.")]
    values = {**({} if reference is None else compare(live, reference)), **training}
    healthy = bands(limits.model_dump())
    if fatal := [alarm for rule in _FATAL if (alarm := _alarm(rule, values, healthy))]:
        return fatal[:1]
    alarms = [alarm for rule in _RULES if (alarm := _alarm(rule, values, healthy))]
    tinted = any(alarm.name in _TINTING for alarm in alarms)
    return [alarm for alarm in alarms if not (tinted and alarm.name == "tint")]


def _alarm(rule: _Rule, values: Figures, healthy: Mapping[str, Band]) -> Alarm | None:
    if rule.figure not in values:
        return None
    value, (low, high) = values[rule.figure], healthy[rule.figure]
    if (rule.side == "high" or value >= low) and (rule.side == "low" or value <= high):
        return None
    words = {"percent": f"{100 * value:.0f} % of the reference's", "points": f"{100 * value:+.0f}"}
    way = "darker" if value < 0 else "brighter"
    return Alarm(rule.name, rule.text.format(**words, value=f"{value:.2g}", way=way))
