"""Config section of checkpoints."""

from __future__ import annotations

from fastvideo.distillation.config.base import Section
from fastvideo.ranges import NonNegativeInt, PositiveInt, Seconds


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes."""

    every: NonNegativeInt = 0
    """Steps per checkpoint; 0 saves only the result."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Steps per checkpoint that is kept permanently; 0 keeps only the newest."""
    asynchronous: bool = False
    """Write in a thread; training waits only for the copy to host memory."""
    mirror: str | None = None
    """URL (`s3://bucket/run`) to which each complete checkpoint is uploaded in the background; `--resume` takes the
    newest of there and here. See `docs/storage.md`."""
    mirror_wait: Seconds = 300.0
    """Most seconds that the end of the run waits for uploads."""
