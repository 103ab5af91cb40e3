"""``DistillTrainer``: the loop. It knows steps, roles, losses and hooks; no family, no algorithm, no process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.types import Batch, RawBatch
from fastvideo.errors import Stopped


class Hook(Protocol):
    """Validation, checkpoint: called in this order for every step."""

    def due(self, step: int) -> bool:
        """True if it must be called right after this step; otherwise it is called before the next step ends."""
        ...

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """``step`` counts finished steps; ``active`` are the roles that were stepped, none if it was skipped."""
        ...


class DistillTrainer:
    """Runs a method.

    One step consumes ``grad_accumulation`` batches; every role that the method declares active is stepped once, on the
    mean of its losses. Non-finite steps are skipped on the device. The host reads that flag one step later, and then
    logs and calls hooks (:meth:`settle`).

    Attributes:
        on_stop: saves the run when a signal stops it; returns an addition to the message.
    """

    def __init__(
        self,
        method: DistillMethod[Any],
        prepare: Callable[[RawBatch], Batch],
        options: TrainerConfig,
        runtime: Runtime,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.method, self.prepare, self.options, self.runtime = method, prepare, options, runtime
        self.hooks = tuple(hooks)
        self.on_stop: Callable[[int], str] = lambda step: ""
        self.step = 0
        self.cpu_seconds = 0.0

    def run(self, data: Iterator[RawBatch]) -> None:
        """Train from the current step to ``max_steps``, or until ``max_cpu_seconds`` are spent on steps.

        Raises:
            NonFiniteError: if a loss or gradient is not finite and the policy does not skip the step.
            RunError: if a device runs out of memory.
            Stopped: after :attr:`on_stop`, if a signal asked any process to stop.
        """
        with self.runtime.running(self.options.max_steps, self.step):
            self._stop_if_asked(meet=True)
            while not self._over():
                begin = time.process_time()
                self.train_step(data)
                self.cpu_seconds += time.process_time() - begin
                due = any(hook.due(self.step) for hook in self.hooks)
                if due or self._over() or self.step % self.options.log_every == 0:
                    self.settle()
                self._stop_if_asked(meet=due)
            self.runtime.log(self.step, self._spent(), closing=True)

    def train_step(self, data: Iterator[RawBatch]) -> None:
        """Take one step, which the next one or :meth:`settle` settles.

        Raises:
            NonFiniteError: as :meth:`settle`, about the step before.
        """
        with self.runtime.step(self.step, self.method.active_roles(self.step)):
            for raw in self.runtime.micro_batches(data):
                for loss in self.method.losses(self.prepare(raw), self.step):
                    self.runtime.backward(loss)
        self.settle()
        self.runtime.update()
        self.step += 1

    def settle(self) -> None:
        """Learn if the last step was finite, log, and call the hooks.

        Raises:
            NonFiniteError: if it was not, and the policy allows no more such steps.
        """
        if (settled := self.runtime.settle()) is None:
            return
        step, stepped = settled
        if step % self.options.log_every == 0:
            self.runtime.log(step, self._spent())
        self.runtime.call([hook.after_step for hook in self.hooks], step, stepped)

    def _over(self) -> bool:
        spent = self.options.max_cpu_seconds and self.cpu_seconds >= self.options.max_cpu_seconds
        return bool(spent) or self.step >= self.options.max_steps

    def _stop_if_asked(self, *, meet: bool) -> None:
        """Stop all processes at the same step, whichever of them was asked."""
        if number := self.runtime.stop_signal(meet=meet):
            self.settle()
            saved = self.on_stop(self.step)
            self.runtime.log(self.step, self._spent(), closing=True)
            raise Stopped(number, f"at step {self.step}{saved}")

    def _spent(self) -> dict[str, float]:
        return {"cpu_seconds": self.cpu_seconds} if self.options.max_cpu_seconds else {}

    def state_dict(self) -> dict[str, Any]:
        """Finished steps, the open metrics window, how many steps were skipped, and the spent part of a budget."""
        return {"step": self.step, **self.runtime.state_dict(), **self._spent()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was stepped."""
        self.step, self.cpu_seconds = int(state["step"]), float(state.get("cpu_seconds", 0.0))
        self.runtime.load_state_dict(state)

    def load_foreign_state(self, state: Mapping[str, Any], step: int) -> str:
        """Go on from the main process's state of a run with other processes; names what is not exact then."""
        self.step = step
        return "metrics begin a new window"
