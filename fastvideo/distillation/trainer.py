"""``DistillTrainer``: the loop. It knows steps, roles and losses; no model family and no algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvideo import stopping
from fastvideo.distillation.engine.attendance import Agreement
from fastvideo.distillation.engine.lora import shared_by
from fastvideo.distillation.engine.metrics import Metrics
from fastvideo.distillation.engine.non_finite import Attempt, NonFiniteError, NonFiniteGuard, clip_gradient
from fastvideo.distillation.engine.parallel.context import has_split_tokens
from fastvideo.distillation.engine.parallel.sharding import free_gathered, reduce_gradients, synchronise
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import training_of
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.types import Batch, RawBatch, RoleLoss
from fastvideo.errors import Stopped

__all__ = ["DistillTrainer", "Hook", "LoopOptions", "NonFiniteError"]


class Hook(Protocol):
    """Validation, checkpoint: called in this order for every step."""

    def due(self, step: int) -> bool:
        """Whether it must be called right after this step; otherwise it is called before the next step ends."""
        ...

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """``step`` counts finished steps; ``active`` are the roles that were stepped, none if it was left out."""
        ...


class Average(Protocol):
    """Averaged weights, updated with every step."""

    def after_update(self, step: int, active: Sequence[str], skip: Tensor) -> None:
        """``step`` counts finished steps; ``skip`` is a scalar on the device, 1 where the step is left out."""
        ...


@dataclass(frozen=True)
class LoopOptions:
    """What the loop reads of the config."""

    max_steps: int
    max_cpu_seconds: float = 0.0
    grad_accumulation: int = 1
    max_grad_norm: float = 1.0
    log_every: int = 10
    context: int = 1
    """Processes that share one sample."""
    sync_every_micro_batch: bool = False
    """Whether sharded gradients are reduced after each micro-batch, not after the last alone."""


class DistillTrainer:
    """Runs a method: accumulation, clipping, stepping, metrics, hooks.

    One step consumes ``grad_accumulation`` batches; every role that the method declares active is stepped once, on the
    mean of its losses. The gradient of a role is averaged over processes. A step that is not finite is left out on the
    device; the host learns of it, and does what depends on it (:meth:`settle`), before the next step ends.

    Attributes:
        on_stop: saves the run when a signal stops it; what it did, for the message.
    """

    def __init__(
        self,
        method: DistillMethod[Any],
        prepare: Callable[[RawBatch], Batch],
        options: LoopOptions,
        tracker: Tracker,
        hooks: Sequence[Hook] = (),
        *,
        averages: Sequence[Average] = (),
        guard: NonFiniteGuard | None = None,
    ) -> None:
        self.method, self.prepare, self.options, self.tracker = method, prepare, options, tracker
        self.hooks, self.averages = tuple(hooks), tuple(averages)
        self.guard = guard or NonFiniteGuard("raise", 0, None)
        self.metrics = Metrics()
        self.agreement = Agreement()
        self.on_stop: Callable[[int], str] = lambda step: ""
        self.step = 0
        self.cpu_seconds = 0.0
        self._open: Attempt | None = None

    def run(self, data: Iterator[RawBatch]) -> None:
        """Train from the current step to ``max_steps``, or until ``max_cpu_seconds`` are spent on steps.

        Raises:
            NonFiniteError: if a loss or gradient is not finite and the policy does not leave out the step.
            Stopped: after :attr:`on_stop`, if a signal asked any process to stop.
        """
        with self.tracker.progress(self.options.max_steps, self.step):
            self._stop_if_asked()
            while not self._over():
                begin = time.process_time()
                self.train_step(data)
                self.cpu_seconds += time.process_time() - begin
                if self._wanted_now():
                    self.settle()
                stopping.step_done()
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """All processes stop at the same step, whichever of them was asked."""
        if number := self.agreement.largest(stopping.received()):
            self.settle()
            raise Stopped(number, f"at step {self.step}{self.on_stop(self.step)}")

    def _over(self) -> bool:
        spent = self.options.max_cpu_seconds and self.cpu_seconds >= self.options.max_cpu_seconds
        return bool(spent) or self.step >= self.options.max_steps

    def _wanted_now(self) -> bool:
        return (
            self._over() or self.step % self.options.log_every == 0 or any(hook.due(self.step) for hook in self.hooks)
        )

    def train_step(self, data: Iterator[RawBatch]) -> tuple[str, ...]:
        """One step, to be settled; the roles that are stepped if it is finite.

        Raises:
            NonFiniteError: as :meth:`settle`, about the step before.
        """
        attempt = Attempt(self.step, tuple(self.method.active_roles(self.step)), self.method.rng.state_dict())
        for left in reversed(range(self.options.grad_accumulation)):
            for role in attempt.active:
                synchronise(
                    shared_by(self.method.bundle[role].network), left == 0 or self.options.sync_every_micro_batch
                )
            attempt.batches.append(next(data))
            self._accumulate(self.prepare(attempt.batches[-1]), attempt)
        handles = [self.method.bundle[role] for role in attempt.active]
        for handle in handles:
            split = has_split_tokens(shared_by(handle.network))
            reduce_gradients(handle.parameters(), self.options.context if split else 1)
            attempt.gradients[handle.name] = clip_gradient(handle, self.options.max_grad_norm)
        self.settle()
        skip = attempt.judge().skip
        for handle in handles:
            training = training_of(handle)
            norm, rate = attempt.gradients[handle.name].total, torch.tensor(training.learning_rate)
            attempt.metrics.append({f"{handle.name}/grad_norm": norm, f"{handle.name}/learning_rate": rate})
            training.step(skip)
        self.step += 1
        for average in self.averages:
            average.after_update(self.step, attempt.active, skip)
        self._open = attempt
        return attempt.active

    def settle(self) -> None:
        """Learn whether the last step was finite, and do what waits for that: metrics, log, hooks.

        Raises:
            NonFiniteError: if it was not, and the policy allows no more such steps.
        """
        attempt, self._open = self._open, None
        if attempt is None:
            return
        step, taken = attempt.step + 1, attempt.active
        if complaint := self.guard.complaint(attempt):
            self.tracker.say(complaint)
            taken = ()
            for role in attempt.active:
                training_of(self.method.bundle[role]).take_back()
        for observed in attempt.metrics if taken else ():
            self.metrics.add(**observed)
        self._log(step)
        for hook in self.hooks:
            hook.after_step(step, taken)
            self._free_gathered()

    def _free_gathered(self) -> None:
        """Trained networks are split again before anything reads or changes their weights."""
        for handle in self.method.bundle:
            if handle.trainable:
                free_gathered(shared_by(handle.network))

    def _accumulate(self, batch: Batch, attempt: Attempt) -> None:
        """Backward of each loss before the next is asked for: one graph is alive at a time."""
        active, seen = attempt.active, []
        for loss in self.method.losses(batch, self.step):
            if loss.role not in active:
                raise RuntimeError(f"the method yielded a loss for {loss.role!r}, active are {active}")
            (loss.value / self.options.grad_accumulation).backward()  # type: ignore[no-untyped-call]
            self._free_gathered()
            self._record(loss, attempt)
            seen.append(loss.role)
        if set(seen) != set(active):
            raise RuntimeError(f"the method declared {active} active and yielded losses for {tuple(seen)}")

    def _record(self, loss: RoleLoss, attempt: Attempt) -> None:
        values = {"loss": loss.value, **loss.metrics}
        attempt.losses.append((loss.role, loss.value.detach()))
        attempt.metrics.append({f"{loss.role}/{name}": value.detach() for name, value in values.items()})

    def _log(self, step: int) -> None:
        if step % self.options.log_every == 0:
            drained = self.metrics.drain()
            skipped = {"skipped_steps": float(self.guard.total)} if self.guard.total else {}
            spent = {"cpu_seconds": self.cpu_seconds} if self.options.max_cpu_seconds else {}
            self.tracker.log(drained | skipped | spent, step)
            losses = {name.split("/")[0]: value for name, value in drained.items() if name.endswith("/loss")}
            self._shown = " ".join(f"{role} {value:.3g}" for role, value in losses.items())
        self.tracker.advance(self._shown)

    _shown = "distilling"

    def state_dict(self) -> dict[str, Any]:
        """Finished steps, the open metrics window, how many steps were left out, and what is spent of a budget."""
        spent = {"cpu_seconds": self.cpu_seconds} if self.options.max_cpu_seconds else {}
        return {"step": self.step, "metrics": self.metrics.state_dict(), "guard": self.guard.state_dict(), **spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.step, self.cpu_seconds = int(state["step"]), float(state.get("cpu_seconds", 0.0))
        self.metrics.load_state_dict(state["metrics"])
        self.guard.load_state_dict(state["guard"])

    def load_foreign_state(self, state: Mapping[str, Any], step: int) -> str:
        """Go on from the main process's state of a run with other processes; what is not exact then."""
        self.step = step
        return "metrics begin a new window"
