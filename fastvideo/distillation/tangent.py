"""Regression targets of continuous-time objectives.

Consistency models use TrigFlow (``x = cos(a) x0 + sin(a) noise``, data std 1, ``a`` an angle in ``[0, pi / 2]``), flow
maps rectified flow. Networks predict rectified-flow velocities in both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastvideo.distillation.interpolant import Interpolant
from fastvideo.distillation.jvp import Derivative, Field
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.types import Scored, level, mean_over_generated

Tangent = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""Signature of :func:`consistency_tangent`."""


def trigflow_velocity(x: Tensor, u: Tensor, angle: Tensor) -> Tensor:
    """TrigFlow's ``F = dx / d angle`` at ``x = cos x0 + sin noise``, from the sample's rectified-flow velocity ``u``.

    ``u`` is taken at ``Interpolant.trigflow(angle).to_flow(x)`` and its ``flow_time``; data std 1. The result
    ``((cos - sin) x + u) / (cos + sin)`` equals ``(cos x - x0) / sin`` without its 0 / 0 at 0.
    """
    cos, sin = expand_time(angle.cos(), x), expand_time(angle.sin(), x)
    return ((cos - sin) * x + u) / (cos + sin)


def trig_field(velocity: Field) -> Field:
    """TrigFlow's ``F(x, angle)`` of a rectified-flow velocity ``u(x_t, t)``, at equal signal-to-noise ratio."""

    def field(x: Tensor, angle: Tensor) -> Tensor:
        way = Interpolant.trigflow(angle)
        return trigflow_velocity(x, velocity(way.to_flow(x), way.flow_time), angle)

    return field


def consistency_tangent(
    x: Tensor, angle: Tensor, prediction: Tensor, flow: Tensor, derivative: Tensor, warmup: float
) -> Tensor:
    """``-cos^2 (F - flow) - w (cos sin x + J)``; at ``w = 1`` it is ``cos(a) d/da`` of ``cos x - sin F`` (sCM eq. 6).

    Args:
        x: noisy samples at ``angle`` ``[B]``.
        prediction: ``F`` of the student there.
        flow: ``dx / d angle`` of the distilled flow.
        derivative: ``J``, of ``F`` along ``cos sin (flow, 1)``.
        warmup: ``w``, from 0 (velocity regression) to 1.
    """
    cos, sin = expand_time(angle.cos(), x), expand_time(angle.sin(), x)
    return -(cos**2) * (prediction - flow) - warmup * (cos * sin * x + derivative)


def sample_warmup_tangent(
    x: Tensor, angle: Tensor, prediction: Tensor, flow: Tensor, derivative: Tensor, warmup: float
) -> Tensor:
    """``-cos sqrt(1 - w^2 sin^2) (F - flow) - (w cos sin x + J)``: rCM's code, equal to the paper at w = 1."""
    cos, sin = expand_time(angle.cos(), x), expand_time(angle.sin(), x)
    return -cos * (1 - warmup**2 * sin**2).sqrt() * (prediction - flow) - (warmup * cos * sin * x + derivative)


def consistency_error(
    field: Field,
    x: Tensor,
    angle: Tensor,
    flow: Tensor,
    derivative: Derivative,
    warmup: float,
    constant: float,
    given: Scored | None = None,
    form: Tangent = consistency_tangent,
) -> tuple[Tensor, Tensor]:
    """Tangent before normalisation, and the squared error ``[B]`` whose gradient moves ``field`` (``F``) along it.

    The derivative's direction contains the factor ``cos sin``, which keeps it bounded (sCM section 4.1).
    """
    scale = angle.cos() * angle.sin()
    slope = derivative(field, x, angle, expand_time(scale, x) * flow, scale)
    prediction = field(x, angle)
    tangent = form(x, angle, prediction.detach(), flow, slope, warmup)
    target = prediction.detach() + unit_rms(tangent, constant, given)
    return tangent, mean_over_generated((prediction - target).square(), given).flatten()


def unit_rms(tangent: Tensor, constant: float, given: Scored | None = None) -> Tensor:
    """``g / (rms(g) + c)``, the root mean square over each sample's generated frames (sCM section 4.1).

    The paper's norm is a root of sums; with means, loss and ``c`` do not depend on the number of elements.
    """
    return tangent / (level(tangent.square(), given).sqrt() + constant)


def mean_velocity_target(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """``v - (t - r) du/dt``, equal to the mean velocity ``u`` from ``t`` to ``r`` (MeanFlow eq. 6).

    ``derivative`` is ``u``'s along ``(v, 1)`` with ``r`` fixed. At ``r = t`` the result is bit-equal to ``v``.
    """
    return velocity - expand_time(t - r, velocity) * derivative
