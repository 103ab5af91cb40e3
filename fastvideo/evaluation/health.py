"""Whether a distillation goes wrong in one of the ways that a loss does not show: figures of videos, and alarms.

Figures of the student's videos are compared with those of a reference (the teacher's videos of the same prompts, or
real ones). Motion and diversity are relative to contrast, so that a paler or more vivid student is not also called a
still one. An alarm is one sentence with a number and what to do. What follows from a worse finding is not reported
beside it: an exploding student says nothing about seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)
FAINT = 1e-3
"""Contrast and motion below this are none: nothing is divided by less."""
Figures = Mapping[str, float]


class Thresholds(Protocol):
    """When to raise an alarm; see ``HealthConfig`` for the meaning of each."""

    @property
    def contrast(self) -> tuple[float, float]: ...
    @property
    def saturation(self) -> tuple[float, float]: ...
    @property
    def motion(self) -> tuple[float, float]: ...
    @property
    def brightness(self) -> float: ...
    @property
    def colour(self) -> float: ...
    @property
    def grid(self) -> float: ...
    @property
    def diversity(self) -> float: ...
    @property
    def latent_std(self) -> float: ...
    @property
    def update_balance(self) -> float: ...
    @property
    def gradient(self) -> float: ...


@dataclass(frozen=True)
class Alarm:
    """What is wrong, in a word and in a sentence."""

    name: str
    text: str


def measure(videos: Tensor, latents: Tensor | None = None, block: int = 8) -> dict[str, float]:
    """Figures of videos.

    Args:
        videos: ``[P, S, 3, T, H, W]`` in ``[-1, 1]``: ``S`` seeds of each of ``P`` prompts.
        latents: ``[P, S, C, F, H, W]``, normalised.
        block: pixels between the borders at which a codec or a patch shows.

    Returns:
        ``brightness`` and ``saturation`` (chroma, but for a common tint) in [0, 1]; ``contrast``, the spread of
        luminance within a frame;
        ``red``, ``green``, ``blue``: mean deviation from grey; ``motion`` and ``diversity``: difference between
        neighbouring frames, and between seeds of a prompt, over contrast; ``grid``: how much steeper borders of blocks
        are than the rest (1 = not); ``latent_mean``, ``latent_std``. What cannot be measured is left out.
    """
    x = (videos.float().clamp(-1, 1) + 1) / 2
    light = torch.einsum("pscthw,c->psthw", x, x.new_tensor(LUMINANCE))
    contrast = light.std(dim=(-2, -1)).mean()
    scale = contrast.clamp_min(FAINT)
    tint = (x - light.unsqueeze(2)).mean(dim=(0, 1, 3, 4, 5))
    plain = x - tint.view(3, 1, 1, 1)
    found = {
        "brightness": light.mean(),
        "contrast": contrast,
        "saturation": (plain.amax(2) - plain.amin(2)).mean(),
        **dict(zip(("red", "green", "blue"), tint, strict=True)),
    }
    if light.shape[2] > 1:
        found["motion"] = light.diff(dim=2).abs().mean() / scale
    if x.shape[1] > 1:
        found["diversity"] = _between_seeds(x) / scale
    if 1 < block < min(light.shape[-2:]):
        found["grid"] = (_borders(light, block) + _borders(light.transpose(-1, -2), block)) / 2
    if latents is not None:
        found |= {"latent_mean": latents.float().mean(), "latent_std": latents.float().std()}
    return {name: float(value) for name, value in found.items()}


def _between_seeds(x: Tensor) -> Tensor:
    """Mean absolute difference between two seeds of a prompt."""
    seeds = x.shape[1]
    pairs = [(x[:, i] - x[:, j]).abs().mean() for i in range(seeds) for j in range(i)]
    return torch.stack(pairs).mean()


def _borders(light: Tensor, block: int) -> Tensor:
    """Mean step across block borders over the mean step elsewhere, along the last dimension."""
    steps = light.diff(dim=-1).abs().mean(dim=tuple(range(light.ndim - 1)))
    border = torch.arange(1, light.shape[-1]) % block == 0
    return steps[border].mean() / steps[~border].mean().clamp_min(FAINT / 10)


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


def find_alarms(live: Figures, reference: Figures | None, training: Figures, limits: Thresholds) -> list[Alarm]:
    """The alarms of one validation.

    Args:
        live: of the student, from :func:`measure`.
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


def _exploding(found: Figures, limits: Thresholds) -> Alarm | None:
    ratio = found.get("latent_std", 1.0)
    if ratio <= limits.latent_std:
        return None
    text = f"the spread of the student's latents is {_percent(ratio)}: it is exploding. Lower its learning rate."
    return Alarm("exploding", text)


def _washed_out(found: Figures, limits: Thresholds) -> Alarm | None:
    ratio = found.get("contrast", 1.0)
    if ratio >= limits.contrast[0]:
        return None
    text = (
        f"contrast is {_percent(ratio)}: the student is washing out to a flat picture. Give the critic more updates "
        f"per student update, or go back to an earlier checkpoint and lower the student's learning rate."
    )
    return Alarm("washed out", text)


def _motion(found: Figures, limits: Thresholds) -> Alarm | None:
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


def _colours(found: Figures, limits: Thresholds) -> Alarm | None:
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


def _brightness(found: Figures, limits: Thresholds) -> Alarm | None:
    drift = found.get("brightness", 0.0)
    if abs(drift) <= limits.brightness:
        return None
    way = "darker" if drift < 0 else "brighter"
    text = f"brightness is {100 * drift:+.0f} points off the reference's: the student gets {way}."
    return Alarm("brightness", text + " Lower its learning rate, or give the critic more updates.")


def _grid(found: Figures, limits: Thresholds) -> Alarm | None:
    if found.get("grid", 1.0) <= limits.grid:
        return None
    text = f"steps at block borders are {_percent(found['grid'])}: a grid shows. The critic cannot keep up: raise its"
    return Alarm("grid", text + " learning rate or method.generator_update_interval.")


def _diversity(found: Figures, limits: Thresholds) -> Alarm | None:
    ratio = found.get("diversity", 1.0)
    if ratio >= limits.diversity:
        return None
    text = f"the difference between seeds is {_percent(ratio)}: the student makes the same video for all of them."
    return Alarm("same for all seeds", text + " Lower the guidance, or add a discriminator.")


def _critic(training: Figures, limits: Thresholds) -> Alarm | None:
    balance = training.get("update_balance", math.inf)
    if balance >= limits.update_balance:
        return None
    text = f"per step the critic moves {balance:.2g} times as far as the student, which it must follow: raise its"
    return Alarm("slow critic", text + " learning rate or method.generator_update_interval.")


def _gradient(training: Figures, limits: Thresholds) -> Alarm | None:
    rms = training.get("dmd_gradient_rms", 0.0)
    if rms <= limits.gradient:
        return None
    text = f"the RMS of the DMD gradient is {rms:.2g} where about 1 is usual: teacher and critic disagree more than the"
    return Alarm("gradient", text + " student is wrong. Warm up the critic, or lower the guidance.")


Rule = Callable[[Figures, Thresholds], Alarm | None]
