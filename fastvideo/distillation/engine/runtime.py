"""``Runtime``: processes, devices and files of a run behind one name, all that the loop knows of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle, frozen
from fastvideo.distillation.config.schema import CheckpointConfig, EMAConfig, ParallelConfig, RunConfig, TrainerConfig
from fastvideo.distillation.engine.attendance import Agreement, naming_lost_processes
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, Parts, RunFacts
from fastvideo.distillation.engine.checkpoint.restore import Restored, check_intact, newest, restore, set_aside
from fastvideo.distillation.engine.checkpoint.state import PerProcess, RoleState, Stateful
from fastvideo.distillation.engine.ema import has_average, keep_averages
from fastvideo.distillation.engine.metrics import Metrics
from fastvideo.distillation.engine.non_finite import Attempt, NonFiniteGuard, clip_gradient
from fastvideo.distillation.engine.optional.diagnosis import StepProfile, explaining_memory
from fastvideo.distillation.engine.optional.memory import keep_freed_memory
from fastvideo.distillation.engine.optional.performance import Performance, TokenSource, shortly
from fastvideo.distillation.engine.optional.startup import StartUp
from fastvideo.distillation.engine.optional.trackers import check_installed
from fastvideo.distillation.engine.optional.watchdog import Watchdog
from fastvideo.distillation.engine.parallel.context import has_split_tokens
from fastvideo.distillation.engine.parallel.distributed import (
    Processes,
    barrier,
    check_agreement,
    start_processes,
    stop_processes,
)
from fastvideo.distillation.engine.parallel.sharding import free_gathered, reduce_gradients, synchronise
from fastvideo.distillation.engine.placement import NetworkSource, result_of
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import training_of
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import RawBatch, RoleLoss, UserError
from fastvideo.stopping import listening, received

__all__ = ["Processes", "Restored", "Runtime", "Session", "Tracker"]


class Trainable(Protocol):
    """The part of a method that the engine needs."""

    bundle: ModelBundle
    rng: RandomStreams


class AfterStep(Protocol):
    """A hook, once it is called."""

    def after_step(self, step: int, active: Sequence[str]) -> None: ...


class Session:
    """One launch of a run: this process among all, its tracker, its start-up clock.

    Raises:
        UserError: for a tracker whose package is not installed.
    """

    def __init__(self, config: RunConfig[Any, Any], processes: Processes, start: StartUp) -> None:
        for backend in config.tracking.backends:
            check_installed(backend)
        self.processes, self.start = processes, start
        self.tracker = Tracker(Path(config.output), enabled=processes.is_main, options=config.tracking)

    @staticmethod
    @contextmanager
    def open(config: RunConfig[Any, Any], began: float | None = None) -> Iterator[Session]:
        """Listen for signals and join the other processes, until the context ends.

        Args:
            config: of the run.
            began: launch time of the run (``time.monotonic``), for the time to its first step; now if not given.

        Raises:
            UserError: if the processes do not fit the layout.
            RunError: naming the processes that were lost meanwhile.
        """
        start = StartUp(monotonic() if began is None else began)
        start.reached("imports")
        _set_up_process(config.trainer)
        layout = config.parallel.model_dump(include={"shard", "replicate", "context", "timeout"})
        with listening(config.trainer.stop_signals):
            processes = start_processes(config.device, **layout)
            try:
                with naming_lost_processes():
                    yield Session(config, processes, start)
            finally:
                stop_processes()

    def check_agreement(self, what: str, values: Mapping[str, Any]) -> None:
        """Check that every process was given the same ``values``.

        Raises:
            UserError: on all of them, naming the first key that differs.
        """
        check_agreement(what, values)

    def wait_for_all(self) -> None:
        """Wait until every process is here."""
        barrier()

    def find_checkpoint(self, folder: Path, wanted: Path | None) -> Path | None:
        """Verify ``wanted``, or find the newest intact checkpoint in ``folder``; ``None`` if there is none.

        Raises:
            UserError: if the one that is wanted, or every complete one, is damaged.
        """
        if wanted is not None:
            check_intact(wanted, self.processes)
        return wanted or newest(folder, self.processes, self.tracker.say)


def _set_up_process(options: TrainerConfig) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        keep_freed_memory()
    # Weights that decay towards zero become denormal, and arithmetic on those is many times slower on a CPU.
    torch.set_flush_denormal(True)


class Runtime:
    """Takes the steps of a method: backward, reduction, clipping, skipping, optimizers, averages, metrics, checkpoints.

    Args:
        source: the family of the networks, to measure tokens per second; they are not measured without it.

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
        parallel: ParallelConfig | None = None,
        ema: EMAConfig | None = None,
        source: TokenSource | None = None,
    ) -> None:
        self.bundle, self.rng, self.options, self.tracker = method.bundle, method.rng, options, tracker
        self.processes, self.parallel = processes or Processes(), parallel or ParallelConfig()
        if options.max_cpu_seconds and self.processes.world_size > 1:
            raise UserError("trainer.max_cpu_seconds: several processes would stop at different steps; give max_steps")
        if options.memory_snapshot and self.processes.device.type != "cuda":
            raise UserError(f"trainer.memory_snapshot is of CUDA memory; this run is on {self.processes.device}")
        self.averages = keep_averages(self.bundle, ema)
        folder = tracker.folder / "non_finite"
        self.guard = NonFiniteGuard(options.non_finite, options.max_skips, folder, self.processes.rank)
        self.metrics, self.agreement = Metrics(), Agreement()
        self.performance = Performance(self.bundle, self.processes, source, options.peak_flops)
        self._profile = StepProfile(
            options.profile, tracker.folder / "profile", self.processes.rank, self.processes.device
        )
        self._attempt: Attempt | None = None
        self._open: Attempt | None = None
        self._asked = 0
        self._shown = "distilling"

    @contextmanager
    def running(self, total: int, done: int) -> Iterator[None]:
        """Show a bar and watch for stalls while the loop runs."""
        with ExitStack() as stack:
            stack.enter_context(self.tracker.progress(total, done))
            seconds, stacks = self.options.watchdog_seconds, self.tracker.folder / "stacks"
            stack.enter_context(Watchdog(seconds, stacks, self.processes.rank))
            snapshot = self.tracker.folder / f"memory-rank-{self.processes.rank}.pickle"
            stack.enter_context(explaining_memory(snapshot if self.options.memory_snapshot else None))
            yield

    @contextmanager
    def step(self, step: int, active: Sequence[str]) -> Iterator[None]:
        """The forward and backward passes of a step of the ``active`` roles happen inside."""
        self._attempt = Attempt(step, tuple(active), self.rng.state_dict())
        self._profile.before_step(step)
        with self.performance.step(tuple(active)):
            yield

    @property
    def _now(self) -> Attempt:
        if self._attempt is None:
            raise RuntimeError("no step is under way")
        return self._attempt

    def micro_batches(self, data: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """The batches of one step; gradients are synchronised in the last one alone, unless the config says else.

        Raises:
            RuntimeError: if the losses of a batch were not those of the active roles.
        """
        attempt = self._now
        for left in reversed(range(self.options.grad_accumulation)):
            for role in attempt.active:
                now = left == 0 or self.parallel.sync_every_micro_batch
                synchronise(self.bundle[role].network, now)
            attempt.batches.append(next(data))
            attempt.trained = []
            self.performance.saw(attempt.batches[-1])
            yield attempt.batches[-1]
            if set(attempt.trained) != set(attempt.active):
                raise RuntimeError(
                    f"the method declared {attempt.active} active and yielded losses for {tuple(attempt.trained)}"
                )

    def backward(self, loss: RoleLoss) -> None:
        """Accumulate a loss's gradient, before the next loss is asked for: one graph is alive at a time.

        Raises:
            RuntimeError: if its role is not active.
        """
        attempt = self._now
        if loss.role not in attempt.active:
            raise RuntimeError(f"the method yielded a loss for {loss.role!r}, active are {attempt.active}")
        with frozen([self.bundle[role] for role in loss.frozen]):  # recomputed forwards too
            (loss.value / self.options.grad_accumulation).backward()  # type: ignore[no-untyped-call]
        self._free_gathered()
        attempt.record(loss)

    def update(self) -> None:
        """Average gradients over processes, clip them, step optimizers, schedules and averages of the active roles.

        The device judges if all losses and gradients were finite, and skips the step if not.
        """
        attempt, self._attempt = self._now, None
        handles = [self.bundle[role] for role in attempt.active]
        for handle in handles:
            split = has_split_tokens(handle.network)
            reduce_gradients(handle.parameters(), self.processes.context if split else 1)
            attempt.gradients[handle.name] = clip_gradient(handle, self.options.max_grad_norm)
        skip = attempt.judge(received()).skip
        for handle in handles:
            training = training_of(handle)
            norm, rate = attempt.gradients[handle.name].total, torch.tensor(training.learning_rate)
            attempt.metrics.append({f"{handle.name}/grad_norm": norm, f"{handle.name}/learning_rate": rate})
            training.step(skip)
        self.averages.after_update(attempt.step + 1, attempt.active, skip)
        self._profile.after_step(attempt.step + 1)
        self._open = attempt

    def settle(self) -> tuple[int, tuple[str, ...]] | None:
        """Read the verdict on the last step: the number of finished steps, and the roles that were stepped.

        ``None`` if it was read before.

        Raises:
            NonFiniteError: if it was not finite, and the policy allows no more such steps.
        """
        attempt, self._open = self._open, None
        if attempt is None:
            return None
        taken, self._asked = attempt.active, attempt.verdict.asked()
        if complaint := self.guard.complaint(attempt):
            self.tracker.say(complaint)
            taken = ()
            for role in attempt.active:
                training_of(self.bundle[role]).take_back()
        for observed in attempt.metrics if taken else ():
            self.metrics.add(**observed)
        return attempt.step + 1, taken

    def call(self, hooks: Sequence[AfterStep], step: int, taken: Sequence[str]) -> None:
        """Call hooks after a settled step; each finds split networks split, whatever the one before it gathered."""
        self.tracker.advance(self._shown)
        with self.performance.paused():
            for hook in hooks:
                hook.after_step(step, taken)
                self._free_gathered()

    def log(self, step: int, spent: Mapping[str, float], *, closing: bool = False) -> None:
        """Write the means of the metrics window, and begin a new one.

        Args:
            closing: the run ends inside the window; one that goes on writes the whole window instead.
        """
        drained = self.metrics.drain()
        if closing and not drained:
            return
        skipped = {"skipped_steps": float(self.guard.total)} if self.guard.total else {}
        figures = self.performance.window(self.options.max_steps - step)
        self.tracker.log(drained | skipped | dict(spent), step, closing=closing, performance=figures)
        losses = {name.split("/")[0]: value for name, value in drained.items() if name.endswith("/loss")}
        self._shown = " ".join(f"{role} {value:.3g}" for role, value in losses.items()) + shortly(figures)

    def stop_signal(self, *, meet: bool) -> int:
        """The number of the signal that asked any process to stop, the same on all; 0 if none was asked.

        It travels with the verdict on each step, which the host reads one step later on a device.

        Args:
            meet: some process may be late, such as after a validation: wait for it, for a day.
        """
        if meet or not self.agreement.several:
            return self.agreement.largest(received())
        if self._open is not None and self.processes.device.type == "cpu":  # where reading the flag waits for nothing
            return self._open.verdict.asked()
        return self._asked

    def _free_gathered(self) -> None:
        """Trained networks are split again before anything reads or changes their weights."""
        for handle in self.bundle:
            if handle.trainable:
                free_gathered(handle.network)

    def result(
        self, role: str, source: NetworkSource
    ) -> AbstractContextManager[tuple[nn.Module | None, dict[str, dict[str, Tensor]]]]:
        """A role's whole network for saving, on the main process alone, and its adapter as files by name."""
        return result_of(self.bundle[role], source, self.processes)

    def has_average(self, role: str) -> bool:
        """True if :meth:`result` holds averaged weights."""
        return has_average(self.bundle[role])

    def parts(self, shared: Mapping[str, Stateful], own: Mapping[str, PerProcess]) -> Parts:
        """Everything of a run that survives: the trained roles, ``shared`` and each process's ``own``."""
        roles = {handle.name: RoleState(handle) for handle in self.bundle if handle.trainable}
        return Parts(roles, shared, own)

    def checkpoints(
        self, folder: Path, parts: Parts, options: CheckpointConfig, facts: tuple[str, str, Mapping[str, str]]
    ) -> CheckpointHook:
        """A hook that saves ``parts`` when due, and after the last step.

        Args:
            facts: the config as YAML, the hash of the part that a resumed run must keep, versions of packages.
        """
        return CheckpointHook(folder, parts, self.processes, options, self.options.max_steps, RunFacts(*facts))

    def restore(self, source: Path, parts: Parts) -> Restored:
        """Load an intact checkpoint into the parts, and rename later ones beside it that are of this run.

        Raises:
            UserError: if its roles or weights do not fit.
        """
        restored = restore(source, parts, self.processes)
        own = source.resolve().parent.parent == self.tracker.folder.resolve()
        return replace(restored, moved=tuple(set_aside(source, self.processes)) if own else ())

    def state_dict(self) -> dict[str, Any]:
        """The open metrics window, and how many steps were skipped."""
        return {"metrics": self.metrics.state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.metrics.load_state_dict(state["metrics"])
        self.guard.load_state_dict(state["guard"])
