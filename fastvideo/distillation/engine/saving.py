"""``Saving``: checkpoints of a run and its result; the loop knows neither, as a checkpoint is a hook of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fastvideo.distillation.config.averages import PostHocConfig
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, Parts, RunFacts
from fastvideo.distillation.engine.checkpoint.restore import ResumePoint, restore, set_aside
from fastvideo.distillation.engine.checkpoint.state import PerProcess, RoleState, Stateful
from fastvideo.distillation.engine.ema import has_average
from fastvideo.distillation.engine.optional.mirror import Mirror, checkpoints_at
from fastvideo.distillation.engine.optional.snapshots import Snapshots, begin
from fastvideo.distillation.engine.placement import NetworkSource, result_of
from fastvideo.distillation.engine.runtime import Runtime

__all__ = ["ResumePoint", "RunFacts", "Saving", "Snapshots"]


class Saving:
    """Everything of a run that is written to be read again."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.bundle, self.processes = runtime, runtime.bundle, runtime.processes

    def result(
        self, role: str, source: NetworkSource
    ) -> AbstractContextManager[tuple[nn.Module | None, dict[str, dict[str, Tensor]]]]:
        """A role's whole network for saving, on the main process alone, and its adapter as files by name."""
        return result_of(self.bundle[role], source, self.processes)

    def has_average(self, role: str) -> bool:
        """True if :meth:`result` holds averaged weights."""
        return has_average(self.bundle[role])

    def parts(self, shared: Mapping[str, Stateful], own: Mapping[str, PerProcess]) -> Parts:
        """State of a run: its trained roles, ``shared`` by all processes, and each process's ``own``."""
        roles = {handle.name: RoleState(handle) for handle in self.bundle if handle.trainable}
        return Parts(roles, shared, own)

    def checkpoints(
        self, folder: Path, parts: Parts, options: CheckpointConfig, facts: RunFacts, over: Callable[[], bool]
    ) -> CheckpointHook:
        """A hook that saves ``parts`` when due, and after the last step, behind which the run is ``over``."""
        mirror = None
        if options.mirror is not None and self.processes.is_main:
            mirror = Mirror(checkpoints_at(options.mirror), folder, options, self.runtime.tracker.say)
            self.runtime.figures_beside.append(mirror.figures)
        return CheckpointHook(folder, parts, self.processes, options, over, facts, mirror)

    def snapshots(self, options: PostHocConfig | None, source: Path | None) -> tuple[Snapshots, ...]:
        """The hook that writes averages of the student, after a ``source`` that was restored; none if not asked for."""
        return begin(self.bundle, options, self.runtime.tracker, self.processes, source)

    def restore(self, source: Path, parts: Parts) -> ResumePoint:
        """Load an intact checkpoint into the parts, and rename later ones beside it that are of this run.

        Raises:
            UserError: if its roles or weights do not fit.
        """
        point = restore(source, parts, self.processes)
        own = source.resolve().parent.parent == self.runtime.tracker.folder.resolve()
        return replace(point, moved=tuple(set_aside(source, self.processes)) if own else ())
