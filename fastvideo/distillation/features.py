"""Features of a role's network: the tokens of its blocks, for methods that judge samples by them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.noise import guide, velocity_to_x0
from fastvideo.distillation.types import Condition


class FeatureModel(Protocol):
    """The part of an adapter that features need; a family without them declares no widths."""

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width of the tokens after each of the network's blocks; empty where it has no features."""
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
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Tokens float32 ``[B, L, D]`` after the blocks ``taps``, with the velocity of the call if it is ``whole``."""
        ...


def seen_by_network(x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """What a network is given for ``x_t`` and ``t``: given frames clean and at time 0."""
    given = condition.given
    return (x_t, t) if given is None else (given.fill(x_t), given.times(t))


class FeatureReader:
    """The part of a role that reads features."""

    adapter: FeatureModel
    network: nn.Module

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None) -> Tensor:
        """The network's velocity."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that this role trains."""

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[int]) -> tuple[Tensor, ...]:
        """Tokens ``[B, L, D]`` after the network's blocks ``taps``; it sees given frames clean, at time 0.

        Tokens of given frames are among them: whoever pools leaves them out (``types.free_tokens``).
        """
        x_t, t = seen_by_network(x_t, t, condition)
        return self.adapter.features(self.network, x_t, t, condition, taps)[1]

    def x0_guided_and_features(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        negative: Condition,
        guidance: float,
        taps: Sequence[int],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:meth:`x0_guided`, and the :meth:`features` of its conditional call; only these carry gradient."""
        seen, times = seen_by_network(x_t, t, condition)
        u, tokens = self.adapter.features(self.network, seen, times, condition, taps, whole=True)
        assert u is not None
        with torch.no_grad():
            if guidance != 1.0:
                u = guide(self.velocity(x_t, t, negative), u, guidance)
            x0 = velocity_to_x0(x_t, u, t)
        return (x0 if condition.given is None else condition.given.fill(x0)), tokens

    def hold(self) -> Callable[[], None]:
        """Freeze the weights until the returned function is called: gradient flows through them and not to them.

        It must last until backward is over, where checkpointed activations are computed again.
        """
        held = self.parameters()
        for parameter in held:
            parameter.requires_grad_(False)

        def release() -> None:
            for parameter in held:
                parameter.requires_grad_(True)

        return release
