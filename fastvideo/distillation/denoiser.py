"""``Denoiser``: a network with its family's conventions; all sampling and training calls one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.noise import GuidanceValue, guidance_at, guide, velocity_to_x0, x0_to_velocity
from fastvideo.distillation.types import Condition

if TYPE_CHECKING:
    from fastvideo.distillation.chunks import Context, Contexts, Past


class Prescription(Protocol):
    """Part of a model folder that says how its networks are sampled."""

    def rescale_guidance(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A guided velocity at ``x_t`` as the family's samplers go on, such as with the norm of the conditional one."""
        ...


class Family(Protocol):
    """Part of an adapter that calls networks. A call depends on its arguments alone.

    So autograd and activation checkpointing just work.
    """

    @property
    def folder(self) -> Prescription:
        """The part of the folder that says how networks are sampled."""
        ...

    @abstractmethod
    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Float32 ``E[noise - x0 | x_t]`` ``[B, C, F, H, W]``; other predictions and schedules convert in here.

        ``t`` are rectified-flow times, float32 ``[B]`` or, for families that support ``frame_times``, ``[B, F]``. Those
        that support ``flow_map`` take ``r`` too (shape of ``t``, ``r <= t``) and answer the mean velocity over
        ``[r, t]``: ``x_r = x_t - (t - r) u``. Those that support ``chunks`` take a ``context``.
        """
        ...

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        """The past after the chunk ``x0`` ``[B, C, c, H, W]``, which the network sees at time ``t``."""
        ...


class Denoiser:
    """Network of a family. Latents are ``[B, C, F, H, W]``, times float32 ``[B]`` or per frame ``[B, F]``, 1 is noise.

    Several denoisers may share one network; ``select`` then turns this role's LoRA adapter on before each call.
    """

    def __init__(self, adapter: Family, network: nn.Module, select: Callable[[], None] | None = None) -> None:
        self.adapter, self.network, self.select = adapter, network, select
        self.boundary: float | None = None
        """Time at which the network changes from its expert of high noise to that of low noise, if it has two."""

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Velocity ``E[noise - x0 | x_t]``, float32; with ``r`` a flow map's mean velocity from ``t`` down to ``r``.

        With a ``context`` the call is causal: over all chunks (``Masked``), or over the next chunk alone (``Past``),
        whose ``condition`` and ``t`` are those of its frames.

        The network sees conditioning frames clean, at time 0. Their known velocity ``(x_t - clean) / t`` replaces the
        prediction, so that formulas on velocities hold there, without gradient. Only flow maps take ``r``.

        Raises:
            UserError: for a past of another network.
        """
        given = condition.given
        if context is not None:
            context.check_maker((self.network, self.select))
        seen, times = self.network_input(x_t, t, condition)
        # A family without flow maps or chunks need not know these arguments.
        options: dict[str, Any] = {} if context is None else {"context": context}
        if r is not None:
            options["r"] = r if given is None else given.times(r)
        u = self.adapter.velocity(self.network, seen, times, condition, **options)
        return u if given is None else x0_to_velocity(x_t, given.clean, t).to(u.dtype).where(given.frames, u)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """Sample at times ``r``: ``x_t - (t - r) u(x_t, t, r)``."""
        return velocity_to_x0(x_t, self.velocity(x_t, t, condition, r=r), t - r)

    def x0(
        self, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """Estimated clean latents, float32, arguments as for :meth:`velocity`; conditioning frames are exact."""
        return exact(velocity_to_x0(x_t, self.velocity(x_t, t, condition, r=r, context=context), t), condition)

    def commit(self, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        """The past after one more finished chunk ``[B, C, c, H, W]``, without gradient.

        ``t`` above 0 is for a context with noise: ``x0`` is then the noisy chunk. A past that is made in inference mode
        serves training too.

        Raises:
            UserError: for a past of another network.
        """
        past.check_maker((self.network, self.select))
        if self.select is not None:
            self.select()
        with torch.inference_mode(False), torch.no_grad():
            x0 = x0.clone() if x0.is_inference() else x0
            after = self.adapter.commit(self.network, past, x0.detach(), condition, t)
        return replace(after, maker=(self.network, self.select))

    def guided_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        negative: Condition,
        guidance: GuidanceValue,
        *,
        r: Tensor | None = None,
        contexts: Contexts = (None, None),
    ) -> Tensor:
        """Velocity under standard guidance; 1 is the conditional prediction and costs one call instead of two.
        Guidance by time is that of each sample's ``t``, and costs two.

        ``contexts`` are those of the conditional and of the unconditional call: each has a past of its own.
        """
        conditional = self.velocity(x_t, t, condition, r=r, context=contexts[0])
        if guidance == 1.0:
            return conditional
        unconditional = self.velocity(x_t, t, negative, r=r, context=contexts[1])
        return self.guided(unconditional, conditional, guidance, x_t, t)

    def guided(
        self, unconditional: Tensor, conditional: Tensor, guidance: GuidanceValue, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Both predictions at ``x_t`` as one, by the guidance at each time and as the family goes on with it."""
        guided = guide(unconditional, conditional, guidance_at(guidance, t))
        return self.adapter.folder.rescale_guidance(guided, conditional, x_t, t)

    def x0_guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition, guidance: GuidanceValue
    ) -> Tensor:
        """Clean latents under standard guidance; guiding x0 and velocity is the same."""
        return exact(velocity_to_x0(x_t, self.guided_velocity(x_t, t, condition, negative, guidance), t), condition)

    def network_input(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Select the role; latents and times that the network sees."""
        if self.select is not None:
            self.select()
        given = condition.given
        return (x_t, t) if given is None else (given.fill(x_t), given.times(t))


def exact(x0: Tensor, condition: Condition) -> Tensor:
    """``x0`` with the conditioning frames put in, if there are any."""
    return x0 if condition.given is None else condition.given.fill(x0)
