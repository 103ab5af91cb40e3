"""Derivative of a network along a direction in ``(x, t)``, for continuous-time objectives.

Forward-mode autodiff is exact and costs about two forwards. A central difference costs two forwards, works with any
network, and errs by its step squared and by rounding (use float32). A config field selects one; none is a fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.types import Need, UserError
from fastvideo.ranges import PositiveFloat

JVPMode = Literal["autodiff", "central_difference"]
Field = Callable[[Tensor, Tensor], Tensor]
"""A function of a sample ``[B, C, F, H, W]`` and its times ``[B]``."""
UNSUPPORTED = ("forward AD", "forward mode", "autograd.Function", "jvp")
"""Phrases of torch's errors about an operation without forward-mode derivative."""


class DerivativeConfig(MethodConfig):
    """Options of a method that takes the derivative of its student along a direction."""

    jvp: JVPMode = "autodiff"
    """`autodiff` is forward-mode and exact; `central_difference` works with any network."""
    jvp_step: PositiveFloat = 1e-3
    """Step of the central difference, in the unit of the method's time; unused by `autodiff`."""

    @property
    def derivative_needs(self) -> frozenset[Need]:
        """Ability of the family that the derivative takes."""
        return frozenset({"jvp"}) if self.jvp == "autodiff" else frozenset()

    @property
    def derivative_note(self) -> str:
        """Note for the log."""
        if self.jvp == "autodiff":
            return "derivatives: forward-mode autodiff, attention in SDPA's math backend, float32"
        return f"derivatives: central differences with step {self.jvp_step:g}"


class Derivative(Protocol):
    """``d field / d s`` at ``s = 0`` along ``(x + s dx, t + s dt)``, without gradient, in the shape of ``x``.

    ``floor`` ``[B]`` are the lowest times at which the field is called, such as the end of a flow map's step.
    """

    def __call__(
        self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, *, floor: Tensor | None = None
    ) -> Tensor: ...


class AutodiffDerivative:
    """Forward-mode autodiff (``torch.func.jvp``), with attention in SDPA's math backend, the only one with support."""

    def __call__(
        self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, *, floor: Tensor | None = None
    ) -> Tensor:
        """One call of ``field``.

        Raises:
            UserError: naming the operation, if one has no forward-mode derivative.
        """
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(field, (x, t), (dx, dt))[1].detach()  # type: ignore[no-any-return]
        except (NotImplementedError, RuntimeError) as error:
            if not any(phrase in str(error) for phrase in UNSUPPORTED):
                raise
            raise UserError(
                f"method.jvp: autodiff does not work with this network: {str(error).splitlines()[0]} "
                f"Use method.jvp: central_difference, or an attention backend that supports forward-mode derivatives"
            ) from error


class CentralDifference:
    """Difference of two calls, at ``s = step`` and ``s = -step``, each shortened to stay inside ``bounds`` of time."""

    def __init__(self, step: float, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        self.step, self.bounds = step, bounds

    def __call__(
        self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, *, floor: Tensor | None = None
    ) -> Tensor:
        """Two calls of ``field``; the divisor is each sample's true spacing."""
        low = torch.full_like(t, self.bounds[0]) if floor is None else floor
        ahead, behind = self._steps(t, dt, low), self._steps(t, -dt, low)
        with torch.no_grad():
            after = field(x + expand_time(ahead, x) * dx, t + ahead * dt)
            before = field(x - expand_time(behind, x) * dx, t - behind * dt)
            # Without any room (r = t = 1) the difference is 0; such a step multiplies it by 0.
            return (after - before) / expand_time((ahead + behind).clamp_min(torch.finfo(t.dtype).tiny), x)

    def _steps(self, t: Tensor, dt: Tensor, low: Tensor) -> Tensor:
        """Largest ``s <= step`` per sample with ``t + s dt`` inside the bounds."""
        room = torch.where(dt > 0, self.bounds[1] - t, t - low) / dt.abs()
        return room.clamp(0.0, self.step).where(dt != 0, self.step)


def derivative(mode: JVPMode, step: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Derivative:
    """Derivative by its name in the config; ``step`` is for central differences."""
    return AutodiffDerivative() if mode == "autodiff" else CentralDifference(step, bounds)
