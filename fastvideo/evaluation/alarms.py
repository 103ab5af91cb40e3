"""Alarms of a training: figures of the student's videos outside their bands around those of a reference.

The reference is the teacher's videos of the same prompts, or real ones. An alarm is one sentence with a number and a
remedy. Consequences of a worse finding raise no alarm of their own: an exploding student says nothing about seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    "brightness": ("brightness", lambda most: (-most, most)),
    "colour": ("colour", lambda most: (-most, most)),
    "grid": ("grid", lambda most: (0.0, most)),
    "diversity": ("diversity", lambda least: (least, math.inf)),
    "latent_std": ("latent_std", lambda most: (0.0, most)),
    "update_balance": ("update_balance", lambda least: (least, math.inf)),
    "dmd_gradient_rms": ("gradient", lambda most: (0.0, most)),
}
"""By figure: the field of ``HealthConfig``, and its value as a band."""
DIFFERENCES = ("brightness", "latent_mean", "colour")
"""Figures compared by difference; the others by ratio."""


@dataclass(frozen=True)
class Alarm:
    """A name for what goes wrong, and a sentence with the number and a remedy."""

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
        name: live[name] / reference[name]
        for name in ("contrast", "saturation", "motion", "grid", "diversity", "latent_std")
        if name in live and reference.get(name, 0.0) > FAINT
    }
    return {**ratios, **differences, "colour": max(channels, key=abs)}


def find_alarms(live: Figures, reference: Figures | None, training: Figures, limits: HealthConfig) -> list[Alarm]:
    """Find the alarms of one validation.

    Args:
        live: figures of the student, from :func:`fastvideo.evaluation.health.measure`.
        reference: of the teacher or of real videos; without it only what needs none is checked.
        training: ``update_balance`` (how far the critic moves per step, over how far the student does) and
            ``dmd_gradient_rms``, as far as the method has them.
    """
    if not all(math.isfinite(value) for value in live.values()):
        return [Alarm("exploding", "the student's videos are not finite: it is exploding. Lower the learning rates.")]
    found = {} if reference is None else compare(live, reference)
    for rule in (_exploding, _washed_out):
        if alarm := rule(found, limits):
            return [alarm]
    rules = (_motion, _colours, _brightness, _grid, _diversity)
    alarms = [alarm for rule in rules if (alarm := rule(found, limits))]
    return alarms + [alarm for rule in (_critic, _gradient) if (alarm := rule(training, limits))]


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} % of the reference's"


def _exploding(found: Figures, limits: HealthConfig) -> Alarm | None:
    ratio = found.get("latent_std", 1.0)
    if ratio <= limits.latent_std:
        return None
    text = f"the spread of the student's latents is {_percent(ratio)}: it is exploding. Lower its learning rate."
    return Alarm("exploding", text)


def _washed_out(found: Figures, limits: HealthConfig) -> Alarm | None:
    ratio = found.get("contrast", 1.0)
    if ratio >= limits.contrast[0]:
        return None
    text = (
        f"contrast is {_percent(ratio)}: the student is washing out to a flat picture. Give the critic more updates "
        f"per student update, or go back to an earlier checkpoint and lower the student's learning rate."
    )
    return Alarm("washed out", text)


def _motion(found: Figures, limits: HealthConfig) -> Alarm | None:
    ratio, (low, high) = found.get("motion", 1.0), limits.motion
    if ratio < low:
        text = (
            f"motion is {_percent(ratio)}: the student is freezing. Users of DMD2 lower the guidance or raise the "
            f"score times (a higher method.score_time_shift), where motion is decided."
        )
        return Alarm("freezing", text)
    if ratio > high:
        return Alarm("flickering", f"motion is {_percent(ratio)}: the student flickers. Lower its learning rate.")
    return None


def _colours(found: Figures, limits: HealthConfig) -> Alarm | None:
    """Saturation, or else a tint: the former brings the latter about."""
    ratio, (low, high) = found.get("saturation", 1.0), limits.saturation
    if ratio > high:
        text = (
            f"saturation is {_percent(ratio)}: the student is over-saturated. Lower the teacher's guidance, or stop at "
            f"an earlier checkpoint."
        )
        return Alarm("over-saturated", text)
    if ratio < low:
        return Alarm("grey", f"saturation is {_percent(ratio)}: the student loses its colours. Raise the guidance.")
    drift = found.get("colour", 0.0)
    if abs(drift) <= limits.colour:
        return None
    text = f"a colour channel is {100 * drift:+.0f} points off the reference's: the student takes on a tint."
    return Alarm("tint", text + " Lower its learning rate, or raise the EMA's decay.")


def _brightness(found: Figures, limits: HealthConfig) -> Alarm | None:
    drift = found.get("brightness", 0.0)
    if abs(drift) <= limits.brightness:
        return None
    way = "darker" if drift < 0 else "brighter"
    text = f"brightness is {100 * drift:+.0f} points off the reference's: the student gets {way}."
    return Alarm("brightness", text + " Lower its learning rate, or give the critic more updates.")


def _grid(found: Figures, limits: HealthConfig) -> Alarm | None:
    if found.get("grid", 1.0) <= limits.grid:
        return None
    text = f"steps at block borders are {_percent(found['grid'])}: a grid shows. The critic cannot keep up: raise its"
    return Alarm("grid", text + " learning rate or method.generator_update_interval.")


def _diversity(found: Figures, limits: HealthConfig) -> Alarm | None:
    ratio = found.get("diversity", 1.0)
    if ratio >= limits.diversity:
        return None
    text = f"the difference between seeds is {_percent(ratio)}: the student makes the same video for all of them."
    return Alarm("same for all seeds", text + " Lower the guidance, or add a discriminator.")


def _critic(training: Figures, limits: HealthConfig) -> Alarm | None:
    balance = training.get("update_balance", math.inf)
    if balance >= limits.update_balance:
        return None
    text = f"per step the critic moves {balance:.2g} times as far as the student, which it must follow: raise its"
    return Alarm("slow critic", text + " learning rate or method.generator_update_interval.")


def _gradient(training: Figures, limits: HealthConfig) -> Alarm | None:
    rms = training.get("dmd_gradient_rms", 0.0)
    if rms <= limits.gradient:
        return None
    text = f"the RMS of the DMD gradient is {rms:.2g} where about 1 is usual: teacher and critic disagree more than the"
    return Alarm("gradient", text + " student is wrong. Warm up the critic, or lower the guidance.")
