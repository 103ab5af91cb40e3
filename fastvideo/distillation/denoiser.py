"""``Denoiser``: a network as a value with its family's conventions. Everything that samples or trains calls one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.noise import guide, velocity_to_x0, x0_to_velocity
from fastvideo.distillation.types import Condition

Tokens = tuple[Tensor, ...]
"""Token features, float32 ``[B, L, D]``, one per tapped block."""


class Family(Protocol):
    """The part of an adapter behind a network call."""

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width ``D`` of the tokens after each of the network's blocks; empty for a family without features."""
        ...

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        """Float32 ``E[noise - x0 | x_t]`` ``[B, C, F, H, W]`` at ``t`` in ``[0, 1]``, or its mean down to ``r``."""
        ...

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[int],
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, Tokens]:
        """Tokens after the blocks ``taps``, with the velocity of the same call if it is ``whole``."""
        ...


class Denoiser:
    """One network with the conventions of its family: rectified-flow times, float32 out, conditioning frames clean.

    Latents are ``[B, C, F, H, W]``, times float32 ``[B]`` or per frame ``[B, F]`` in ``[0, 1]`` with 1 pure noise.

    Args:
        adapter: the family that calls the network.
        network: of that family; several denoisers may share one.
        select: runs before each call; turns this role's LoRA adapter on in a shared network.
    """

    def __init__(self, adapter: Family, network: nn.Module, select: Callable[[], None] | None = None) -> None:
        self.adapter, self.network, self.select = adapter, network, select

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None) -> Tensor:
        """Velocity ``E[noise - x0 | x_t]``, float32; with ``r`` a flow map's mean velocity from ``t`` down to ``r``.

        The network sees conditioning frames clean and at time 0, whatever ``x_t`` holds there. Their velocity is known,
        ``(x_t - clean) / t``, and replaces the prediction: formulas on velocities hold for them too, and no gradient
        comes from them. ``r`` is passed to flow maps only; other families do not take it.
        """
        given = condition.given
        seen, times = self._network_input(x_t, t, condition)
        if r is None:
            u = self.adapter.velocity(self.network, seen, times, condition)
        else:
            down_to = r if given is None else given.times(r)
            u = self.adapter.velocity(self.network, seen, times, condition, r=down_to)
        return u if given is None else x0_to_velocity(x_t, given.clean, t).to(u.dtype).where(given.frames, u)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """Sample at times ``r``: ``x_t - (t - r) u(x_t, t, r)``; conditioning frames come as they are at ``r``."""
        return velocity_to_x0(x_t, self.velocity(x_t, t, condition, r=r), t - r)

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Estimate of the clean latents, float32; conditioning frames are exact."""
        return _exact(velocity_to_x0(x_t, self.velocity(x_t, t, condition), t), condition)

    def guided_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        negative: Condition,
        guidance: float,
        *,
        r: Tensor | None = None,
    ) -> Tensor:
        """Velocity under standard guidance; 1 is the conditional prediction and costs one call instead of two."""
        conditional = self.velocity(x_t, t, condition, r=r)
        if guidance == 1.0:
            return conditional
        return guide(self.velocity(x_t, t, negative, r=r), conditional, guidance)

    def x0_guided(self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition, guidance: float) -> Tensor:
        """Clean latents under standard guidance (guiding x0 or velocity is the same: both are affine in ``x_t``)."""
        return _exact(velocity_to_x0(x_t, self.guided_velocity(x_t, t, condition, negative, guidance), t), condition)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[int]) -> Tokens:
        """Tokens ``[B, L, D]`` after the network's blocks ``taps``.

        Tokens of conditioning frames are among them; ``types.free_tokens`` tells them apart for pooling.
        """
        seen, times = self._network_input(x_t, t, condition)
        return self.adapter.features(self.network, seen, times, condition, taps)[1]

    def x0_guided_and_features(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        negative: Condition,
        guidance: float,
        taps: Sequence[int],
    ) -> tuple[Tensor, Tokens]:
        """:meth:`x0_guided`, and the :meth:`features` of its conditional call; only these carry gradient."""
        seen, times = self._network_input(x_t, t, condition)
        u, tokens = self.adapter.features(self.network, seen, times, condition, taps, whole=True)
        assert u is not None
        with torch.no_grad():
            if guidance != 1.0:
                u = guide(self.velocity(x_t, t, negative), u, guidance)
            return _exact(velocity_to_x0(x_t, u, t), condition), tokens

    def _network_input(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Latents and times that the network sees; this role's adapter is on afterwards."""
        if self.select is not None:
            self.select()
        given = condition.given
        return (x_t, t) if given is None else (given.fill(x_t), given.times(t))


def _exact(x0: Tensor, condition: Condition) -> Tensor:
    return x0 if condition.given is None else condition.given.fill(x0)
