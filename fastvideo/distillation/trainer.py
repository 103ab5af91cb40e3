"""``DistillTrainer``: the loop. It knows steps, roles and losses; no model family and no algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.distributed import average_gradients
from fastvideo.distillation.engine.metrics import Metrics
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.types import Batch, RawBatch, RoleLoss
from fastvideo.errors import RunError


class Hook(Protocol):
    """EMA, validation, checkpoint: called in this order after every step."""

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """``step`` counts finished steps; ``active`` are the roles that were stepped."""
        ...


@dataclass(frozen=True)
class LoopOptions:
    """What the loop reads of the config."""

    max_steps: int
    grad_accumulation: int = 1
    max_grad_norm: float = 1.0
    log_every: int = 10


class NonFiniteError(RunError):
    """A gradient that is not finite: names the role and the step. No state was changed by that step."""


class DistillTrainer:
    """Runs a method: accumulation, clipping, stepping, metrics, hooks.

    One step consumes ``grad_accumulation`` batches; every role that the method declares active is stepped once, on the
    mean of its losses. The gradient of a role is averaged over processes.
    """

    def __init__(
        self,
        method: DistillMethod[Any],
        prepare: Callable[[RawBatch], Batch],
        options: LoopOptions,
        tracker: Tracker,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.method, self.prepare, self.options, self.tracker = method, prepare, options, tracker
        self.hooks = tuple(hooks)
        self.metrics = Metrics()
        self.step = 0

    def run(self, data: Iterator[RawBatch]) -> None:
        """Train from the current step to ``max_steps``."""
        with self.tracker.progress(self.options.max_steps, self.step):
            while self.step < self.options.max_steps:
                active = self.train_step(data)
                self.step += 1
                self._log()
                for hook in self.hooks:
                    hook.after_step(self.step, active)

    def train_step(self, data: Iterator[RawBatch]) -> tuple[str, ...]:
        """One step; the roles that were stepped.

        Raises:
            NonFiniteError: if a gradient is not finite.
        """
        active = self.method.active_roles(self.step)
        for _ in range(self.options.grad_accumulation):
            self._accumulate(self.prepare(next(data)), active)
        handles = [self.method.bundle[role] for role in active]
        norms = [self._clip(handle) for handle in handles]
        for handle, norm in zip(handles, norms, strict=True):
            rate = torch.tensor(handle.learning_rate)
            self.metrics.add(**{f"{handle.name}/grad_norm": norm, f"{handle.name}/learning_rate": rate})
            handle.step()
        return active

    def _accumulate(self, batch: Batch, active: Sequence[str]) -> None:
        """Backward of each loss before the next is asked for: one graph is alive at a time."""
        seen = []
        for loss in self.method.losses(batch, self.step):
            if loss.role not in active:
                raise RuntimeError(f"the method yielded a loss for {loss.role!r}, active are {tuple(active)}")
            (loss.value / self.options.grad_accumulation).backward()  # type: ignore[no-untyped-call]
            self._record(loss)
            seen.append(loss.role)
        if set(seen) != set(active):
            raise RuntimeError(f"the method declared {tuple(active)} active and yielded losses for {tuple(seen)}")

    def _record(self, loss: RoleLoss) -> None:
        values = {"loss": loss.value, **loss.metrics}
        self.metrics.add(**{f"{loss.role}/{name}": value for name, value in values.items()})

    def _clip(self, handle: RoleHandle) -> Tensor:
        """Average and clip one role's gradient; its norm before clipping."""
        parameters = handle.parameters()
        average_gradients(parameters)
        norm = clip_grad_norm_(parameters, self.options.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"step {self.step}: the gradient of role {handle.name!r} is not finite (norm {norm.item()}). "
                f"Lower its learning rate or the guidance, or look at the batch"
            )
        return norm

    def _log(self) -> None:
        if self.step % self.options.log_every == 0:
            drained = self.metrics.drain()
            self.tracker.log(drained, self.step)
            losses = {name.split("/")[0]: value for name, value in drained.items() if name.endswith("/loss")}
            self._shown = " ".join(f"{role} {value:.3g}" for role, value in losses.items())
        self.tracker.advance(self._shown)

    _shown = "distilling"

    def state_dict(self) -> dict[str, Any]:
        """Finished steps and the open metrics window."""
        return {"step": self.step, "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.step = int(state["step"])
        self.metrics.load_state_dict(state["metrics"])
