"""``Runtime``: the engine's one face to the loop. It takes the steps; the loop says which roles and which losses.

A step goes ``step`` -> ``micro_batches`` -> ``backward`` -> ``update`` -> ``settle``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle, frozen
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.non_finite import NonFiniteGuard, StepRecord, clip_gradient
from fastvideo.distillation.engine.optional.diagnosis import StepProfile, explaining_memory, explaining_recomputation
from fastvideo.distillation.engine.optional.performance import Performance, TokenSource, shortly
from fastvideo.distillation.engine.optional.recorder import STACKS
from fastvideo.distillation.engine.optional.watchdog import Watchdog
from fastvideo.distillation.engine.parallel.collective import Agreement
from fastvideo.distillation.engine.parallel.context import has_split_tokens
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import free_gathered, reduce_gradients, synchronise
from fastvideo.distillation.engine.tracking import Metrics, Tracker
from fastvideo.distillation.engine.training import training_of
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import RawBatch, RoleLoss, UserError

__all__ = ["Processes", "Runtime", "Tracker"]


class Trainable(Protocol):
    """The part of a method that the engine needs."""

    bundle: ModelBundle
    rng: RandomStreams


class Averages(Protocol):
    """Averages of weights."""

    def after_update(self, step: int, active: Sequence[str], skip: Tensor) -> None:
        """Follow an update of the ``active`` roles, unless ``skip`` (a scalar) is 1."""
        ...


class Runtime:
    """Takes the steps of a method: backward, reduction, clipping, skipping, optimizers, averages, metrics, checkpoints.

    Args:
        sync_every_micro_batch: reduce sharded gradients after each micro-batch instead of the last of a step.
        averages: averages of weights that follow each update.
        source: the family of the networks, to measure tokens per second; default: not measured.

    Raises:
        UserError: if several processes have a budget of CPU time, or a CPU has a snapshot of CUDA memory.
    """

    def __init__(
        self,
        method: Trainable,
        options: TrainerConfig,
        tracker: Tracker,
        processes: Processes | None = None,
        *,
        sync_every_micro_batch: bool = False,
        averages: Averages | None = None,
        source: TokenSource | None = None,
    ) -> None:
        self.bundle, self.rng, self.options, self.tracker = method.bundle, method.rng, options, tracker
        self.processes, self.sync_every_micro_batch = processes or Processes(), sync_every_micro_batch
        rank, device, folder = self.processes.rank, self.processes.device, tracker.folder
        if options.max_cpu_seconds and self.processes.world_size > 1:
            raise UserError("trainer.max_cpu_seconds: several processes would stop at different steps; give max_steps")
        if options.memory_snapshot and device.type != "cuda":
            raise UserError(f"trainer.memory_snapshot is of CUDA memory; this run is on {device}")
        self.averages = averages
        self.guard = NonFiniteGuard(options.non_finite, options.max_skips, folder / "non_finite", rank)
        self.metrics, self.agreement = Metrics(), Agreement()
        self.performance = Performance(self.bundle, self.processes, source, options.peak_flops)
        self._profile = StepProfile(options.profile, folder / "profile", rank, device)
        self._record = StepRecord(0, (), {})
        self._unsettled: StepRecord | None = None
        self._stop_signal = 0
        self._shown = "distilling"
        self.figures_beside: list[Callable[[], dict[str, float]]] = []
        """More figures of each metrics window, such as those of uploads."""

    @contextmanager
    def running(self, total: int, done: int) -> Iterator[None]:
        """Show a bar and watch for stalls while the loop runs."""
        rank, folder = self.processes.rank, self.tracker.folder
        snapshot = folder / f"memory-rank-{rank}.pickle" if self.options.memory_snapshot else None
        if self.processes.device.type == "cuda":  # NCCL's own watchdog makes no folder
            (folder / STACKS).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(self.tracker.progress(total, done))
            stack.enter_context(Watchdog(self.options.watchdog_seconds, folder / STACKS, rank).watching())
            stack.enter_context(explaining_memory(snapshot))
            yield

    @contextmanager
    def step(self, step: int, active: Sequence[str]) -> Iterator[None]:
        """Surround the forward and backward passes of one step of the ``active`` roles."""
        self._record = StepRecord(step, tuple(active), self.rng.state_dict())
        self._profile.before_step(step)
        with self.performance.step(tuple(active)):
            yield

    def micro_batches(self, data: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """Batches of one step; gradients are synchronised in the last alone, or as the config says.

        Raises:
            UserError: if the losses of a batch were not those of the active roles.
        """
        record = self._record
        for left in reversed(range(self.options.grad_accumulation)):
            for role in record.active:
                synchronise(self.bundle[role].network, left == 0 or self.sync_every_micro_batch)
            record.batches.append(next(data))
            record.trained = []
            self.performance.saw(record.batches[-1])
            yield record.batches[-1]
            if set(record.trained) != set(record.active):
                raise UserError(record.untrained())

    def backward(self, loss: RoleLoss) -> None:
        """Accumulate a loss's gradient before the next loss is asked for: one graph is alive at a time.

        Raises:
            UserError: if its role is not active, its value or a metric is no scalar, or recomputed calls differ.
        """
        self._record.add(loss)
        with frozen([self.bundle[role] for role in loss.frozen]), explaining_recomputation(loss):
            (loss.value / self.options.grad_accumulation).backward()  # type: ignore[no-untyped-call]
        self._free_gathered()

    def update(self) -> None:
        """Average gradients over processes, clip them, step optimizers, schedules and averages of the active roles.

        The device checks that all losses and gradients are finite, and skips the step if not.
        """
        record = self._record
        handles = [self.bundle[role] for role in record.active]
        for handle in handles:
            split = has_split_tokens(handle.network)
            reduce_gradients(handle.parameters(), self.processes.context if split else 1)
            record.gradients[handle.name] = clip_gradient(handle, self.options.max_grad_norm)
        skip = record.check().skip
        for handle in handles:
            training = training_of(handle)
            norm, rate = record.gradients[handle.name].total, torch.tensor(training.learning_rate)
            record.metrics.append({f"{handle.name}/grad_norm": norm, f"{handle.name}/learning_rate": rate})
            training.step(skip)
        if self.averages is not None:
            self.averages.after_update(record.step + 1, record.active, skip)
        self._profile.after_step(record.step + 1)
        self._unsettled = record

    def settle(self) -> tuple[int, tuple[str, ...]] | None:
        """Read the check of the last step: the number of finished steps, and the roles that were stepped.

        ``None`` if it was read before.

        Raises:
            NonFiniteError: if it was not finite, and the policy allows no more such steps.
        """
        record, self._unsettled = self._unsettled, None
        if record is None:
            return None
        self._stop_signal = record.finite.stop_signal()
        if message := self.guard.message(record):
            self.tracker.say(message)
            for role in record.active:
                training_of(self.bundle[role]).undo()
            return record.step + 1, ()
        for observed in record.metrics:
            self.metrics.add(**observed)
        return record.step + 1, record.active

    def call(self, hooks: Sequence[Callable[[int, Sequence[str]], None]], step: int, stepped: Sequence[str]) -> None:
        """Call hooks after a settled step; each finds sharded networks sharded, whatever the last one gathered."""
        self.tracker.advance(self._shown)
        with self.performance.paused():
            for hook in hooks:
                hook(step, stepped)
                self._free_gathered()

    def log(self, step: int, spent: Mapping[str, float], *, closing: bool = False) -> None:
        """Write the means of the metrics window, and begin a new one.

        Args:
            closing: the run ends inside the window; a run that resumes writes the whole window instead.
        """
        drained = self.metrics.drain()
        if closing and not drained:
            return
        skipped = {"skipped_steps": float(self.guard.total)} if self.guard.total else {}
        figures = self.performance.window(self.options.max_steps - step)
        for beside in self.figures_beside:
            figures = figures | beside()
        self.tracker.log(drained | skipped | dict(spent), step, closing=closing, performance=figures)
        losses = {name.split("/")[0]: value for name, value in drained.items() if name.endswith("/loss")}
        self._shown = " ".join(f"{role} {value:.3g}" for role, value in losses.items()) + shortly(figures)

    def stop_signal(self, *, meet: bool) -> int:
        """Number of the signal that asked any process to stop, the same on all; 0 if none was asked.

        It travels with the check of each step, which the host reads one step later on a device.

        Args:
            meet: wait for processes that may be late, such as after a validation.
        """
        self.agreement.step_done()
        if meet or self.agreement.alone:
            return self.agreement.stop_signal()
        if self._unsettled is not None and self.processes.device.type == "cpu":  # the flag is on the host already
            return self._unsettled.finite.stop_signal()
        return self._stop_signal

    def leave(self, number: int, message: str) -> NoReturn:
        """Wait until every process has saved, as torchrun ends all of them as soon as one leaves.

        Raises:
            Stopped: by that signal, with the message.
        """
        self.agreement.leave(number, message)

    def _free_gathered(self) -> None:
        """Shard trained networks again before anything reads or changes their weights."""
        for handle in self.bundle:
            if handle.trainable:
                free_gathered(handle.network)

    def state_dict(self) -> dict[str, Any]:
        """The open metrics window, and the number of skipped steps."""
        return {"metrics": self.metrics.state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.metrics.load_state_dict(state["metrics"])
        self.guard.load_state_dict(state["guard"])
