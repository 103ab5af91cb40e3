"""Traces of some steps for torch's profiler, snapshots of memory that ran out, and what torch's errors mean here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointError

from fastvideo.distillation.config.sections import ProfileConfig
from fastvideo.distillation.types import RoleLoss
from fastvideo.errors import RunError, UserError
from fastvideo.wording import see

ENTRIES = 100_000
"""Allocations in a snapshot."""
REMEDY = (
    "set a larger parallel.shard, parallel.activation_checkpointing: full, a smaller data.batch_size (with "
    "trainer.grad_accumulation), or train adapters (roles.NAME.lora)"
)


class StepProfile:
    """Writes a trace of some steps, for ``chrome://tracing`` or Perfetto.

    Args:
        options: the steps; ``None`` records none.
        folder: parent of ``rank-N.json``.
    """

    def __init__(self, options: ProfileConfig | None, folder: Path, rank: int, device: torch.device) -> None:
        self.options, self.file = options, folder / f"rank-{rank}.json"
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._running: profile | None = None

    def before_step(self, step: int) -> None:
        """Start before the first of the steps; ``step`` counts finished steps."""
        if self.options is not None and step == self.options.start:
            self._running = profile(activities=self._activities)
            self._running.start()

    def after_step(self, step: int) -> None:
        """Stop after the last of them, and write the trace."""
        if self._running is None or self.options is None or step < self.options.start + self.options.steps:
            return
        self._running.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.file))
        self._running = None


@contextmanager
def explaining_memory(snapshot: Path | None) -> Iterator[None]:
    """Turn an out-of-memory error into a message with remedies.

    Args:
        snapshot: file for CUDA's memory snapshot (https://pytorch.org/memory_viz shows it); ``None`` records none.

    Raises:
        RunError: instead of torch's error.
    """
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        where = ""
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
            where = f" A snapshot is in {snapshot}."
        raise RunError(
            f"out of memory: {str(error).splitlines()[0]} What helps: {REMEDY}.{where}{see('memory-runs-out')}"
        ) from error
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def explaining_recomputation(loss: RoleLoss) -> Iterator[None]:
    """Turn torch's error about a recomputed call, inside the backward of ``loss``, into the rule on frozen roles.

    Raises:
        UserError: instead of torch's error.
    """
    try:
        yield
    except CheckpointError as error:
        raise UserError(
            f"the loss of role {loss.role!r}: parallel.activation_checkpointing calls its networks again in backward, "
            f"where they kept other tensors than at first. Call the roles of its RoleLoss(frozen=...), here "
            f"{', '.join(loss.frozen) or 'none'}, inside `with frozen((self.ROLE,)):`, and no other role"
        ) from error
