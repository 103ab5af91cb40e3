"""``DistillTrainer``: the loop over steps, roles, losses and hooks; it knows no family, algorithm or process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.types import Batch, RawBatch


class Hook(Protocol):
    """Work after each step, such as validation or a checkpoint."""

    def due(self, step: int) -> bool:
        """True if it must run right after this step; otherwise it runs before the next step ends."""
        ...

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Run after ``step`` finished steps; ``active`` are the updated roles, none after a skipped step."""
        ...


class DistillTrainer:
    """Runs a method.

    One step consumes ``grad_accumulation`` batches and updates every active role once, on the mean of its losses.
    Non-finite steps are skipped on the device. The host reads the flag one step later and then logs and calls hooks
    (:meth:`settle`). After a signal ``on_stop`` saves the run and returns an addition to the message.
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
        """Train from the current step to ``max_steps``, or for ``max_cpu_seconds`` of steps.

        Raises:
            NonFiniteError: if a loss or gradient is not finite and the policy does not skip the step.
            RunError: if a device runs out of memory.
            Stopped: after ``on_stop``, if any process received a stop signal.
        """
        with self.runtime.running(self.options.max_steps, self.step):
            self._stop_if_asked(meet=True)
            while not self.over():
                begin = time.process_time()
                self.train_step(data)
                self.cpu_seconds += time.process_time() - begin
                due = any(hook.due(self.step) for hook in self.hooks)
                if due or self.over() or self.step % self.options.log_every == 0:
                    self.settle()
                self._stop_if_asked(meet=due)
            self.runtime.log(self.step, self._spent(), closing=True)

    def train_step(self, data: Iterator[RawBatch]) -> None:
        """Take one step and settle the previous one."""
        with self.runtime.step(self.step, self.method.active_roles(self.step)):
            for raw in self.runtime.micro_batches(data):
                for loss in self.method.losses(self.prepare(raw), self.step):
                    self.runtime.backward(loss)
        self.settle()
        self.runtime.update()
        self.step += 1

    def settle(self) -> None:
        """Read the last step's finite flag, log, and call the hooks.

        Raises:
            NonFiniteError: if the step was not finite and the policy allows no more of them.
        """
        if (settled := self.runtime.settle()) is None:
            return
        step, stepped = settled
        if step % self.options.log_every == 0:
            self.runtime.log(step, self._spent())
        self.runtime.call([hook.after_step for hook in self.hooks], step, stepped)

    def over(self) -> bool:
        """True after the last step."""
        return self.step >= self.options.max_steps or 0 < self.options.max_cpu_seconds <= self.cpu_seconds

    def _stop_if_asked(self, *, meet: bool) -> None:
        """Stop all processes at the same step if any received a signal."""
        if number := self.runtime.stop_signal(meet=meet):
            self.settle()
            saved = self.on_stop(self.step)
            self.runtime.log(self.step, self._spent(), closing=True)
            self.runtime.leave(number, f"at step {self.step}{saved}")

    def _spent(self) -> dict[str, float]:
        return {"cpu_seconds": self.cpu_seconds} if self.options.max_cpu_seconds else {}

    def state_dict(self) -> dict[str, Any]:
        """Finished steps, open metrics window, count of skipped steps, and spent CPU time of a limited run."""
        return {"step": self.step, **self.runtime.state_dict(), **self._spent()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from :meth:`state_dict`."""
        self.step, self.cpu_seconds = int(state["step"]), float(state.get("cpu_seconds", 0.0))
        self.runtime.load_state_dict(state)

    def load_foreign_state(self, state: Mapping[str, Any], step: int) -> str:
        """Load the main rank's state of a run in another layout; returns a note of the inexact part."""
        self.step = step
        return "metrics begin a new window"
