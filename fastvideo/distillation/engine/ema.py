"""Exponential moving average of one role's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvideo.distillation.bundle import RoleHandle, copy_network


class EMAHook:
    """Updates ``handle.ema`` after each optimizer step of its role, and only then.

    Up to ``start_step`` the average is a copy of the live weights, so that it never remembers the initial ones.
    """

    def __init__(self, handle: RoleHandle, decay: float, start_step: int = 0) -> None:
        self.handle, self.decay, self.start_step = handle, decay, start_step
        handle.ema = copy_network(handle.network).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, step: int, active: Sequence[str]) -> None:
        """``ema <- decay ema + (1 - decay) weights`` if the role was stepped."""
        if self.handle.name not in active or self.handle.ema is None:
            return
        decay = 0.0 if step < self.start_step else self.decay
        live = self.handle.network.state_dict()
        for name, average in self.handle.ema.state_dict().items():
            if average.is_floating_point():
                average.lerp_(live[name], 1 - decay)
            else:
                average.copy_(live[name])
