"""Exponential moving average of one role's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle, copy_network


class EMAHook:
    """Updates ``handle.ema`` after each optimizer step of its role, and only then.

    Up to ``start_step`` the average is a copy of the live weights, so that it never remembers the initial ones.
    """

    def __init__(self, handle: RoleHandle, decay: float, start_step: int = 0) -> None:
        self.handle, self.decay, self.start_step = handle, decay, start_step
        handle.ema = copy_network(handle.network).requires_grad_(False)

    @torch.no_grad()
    def after_update(self, step: int, active: Sequence[str], skip: Tensor) -> None:
        """``ema <- decay ema + (1 - decay) weights`` if the role was stepped, and ``skip`` (a scalar) is not 1.

        A skipped step leaves the average as it is, to the bit: ``lerp`` with weight 0 returns its first argument.
        """
        if self.handle.name not in active or self.handle.ema is None:
            return
        decay = 0.0 if step < self.start_step else self.decay
        weight = (1 - decay) * (1 - skip)
        live = self.handle.network.state_dict()
        for name, average in self.handle.ema.state_dict().items():
            if average.is_floating_point():
                average.lerp_(live[name], weight.to(average.dtype))
            else:
                average.copy_(live[name])
