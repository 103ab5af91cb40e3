"""``RoleTraining``: optimizer, learning-rate schedule and averages of one trained role, which move together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvideo.distillation.bundle import RoleHandle, Training


@dataclass
class RoleTraining:
    """Trains one role.

    Attributes:
        ema: averages of ``handle.tensors()`` by name, for a role that has them; shards where those are shards.
    """

    optimizer: Optimizer
    lr_scheduler: LRScheduler | None = None
    ema: dict[str, Tensor] | None = None
    _schedule_before: tuple[dict[str, Any], list[float]] = field(default=({}, []), init=False, repr=False)

    def step(self, skip: Tensor | None = None) -> None:
        """Move optimizer and lr schedule together, then drop the gradients: they cannot fall out of step.

        Args:
            skip: float scalar on the device. Where it is 1 the optimizer changes nothing, which the host may not know
                yet: the schedule moves, and :meth:`take_back` moves it back.
        """
        if skip is None or skips_on_device(self.optimizer):
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by fused kernels
            self.optimizer.step()
        elif not bool(skip):  # waits for the device: such an optimizer has no other way to learn of it
            self.optimizer.step()
        if self.lr_scheduler is not None:
            self._schedule_before = self.lr_scheduler.state_dict(), self._rates()
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_back(self) -> None:
        """Undo the schedule's part of a :meth:`step` that the optimizer skipped."""
        if self.lr_scheduler is None:
            return
        state, rates = self._schedule_before
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])


def training_of(handle: RoleHandle) -> Training:
    """Optimizer, schedule and averages of a trained role.

    Raises:
        RuntimeError: for a frozen role.
    """
    if handle.training is None:
        raise RuntimeError(f"role {handle.name!r} has no optimizer")
    return handle.training


def skips_on_device(optimizer: Optimizer) -> bool:
    """True if the optimizer's kernels read the skip flag on the device (torch's fused ones do)."""
    return bool(optimizer.defaults.get("fused"))
