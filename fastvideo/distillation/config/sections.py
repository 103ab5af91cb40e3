"""Sections of a config that the loop and its runtime read."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fastvideo.distillation.config.base import RESUMABLE, Section


class ProfileConfig(Section):
    """Steps that torch's profiler records."""

    start: NonNegativeInt = 10
    """Finished steps before the first one."""
    steps: PositiveInt = 3
    """How many."""


class TrainerConfig(Section):
    """The loop."""

    max_steps: Annotated[PositiveInt, RESUMABLE] = 1000
    """Steps; every step trains the critic (or whatever the method trains each time) once."""
    max_cpu_seconds: Annotated[NonNegativeFloat, RESUMABLE] = 0.0
    """End sooner, with the step in which this one process has spent so much CPU time on steps: a budget that other work
    on the machine does not touch. Validation and checkpoints are not counted; 0 sets no limit."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per step; the effective batch is this x batch size x processes."""
    max_grad_norm: PositiveFloat = 1.0
    """Each role's gradient is clipped to this norm."""
    optimizer_states: Literal["float32", "8bit"] = "float32"
    """What AdamW keeps its moments in: `8bit` takes a quarter of the memory, is slower on a CPU, and needs torchao
    (extra `eightbit`); see `docs/scaling.md`."""
    non_finite: Annotated[Literal["raise", "skip"], RESUMABLE] = "raise"
    """What to do about a loss or gradient that is not finite: stop, or leave that step out and go on."""
    max_skips: Annotated[NonNegativeInt, RESUMABLE] = 10
    """With `skip`: the run stops when more steps than this in a row were not finite."""
    stop_signals: Annotated[tuple[str, ...], RESUMABLE] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """Signals that stop the run at the next safe point, with a checkpoint; a second one stops it at once."""
    watchdog_seconds: Annotated[NonNegativeFloat, RESUMABLE] = 1800.0
    """The run ends, with the stacks of all processes in its folder, when none of them finishes a step or a network call
    of a validation for this long; 0 waits for ever."""
    log_every: Annotated[PositiveInt, RESUMABLE] = 10
    """Steps between two lines of metrics."""
    threads: Annotated[NonNegativeInt, RESUMABLE] = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    keep_freed_memory: Annotated[bool, RESUMABLE] = False
    """On a CPU under Linux: memory that tensors free stays with the process and is used again: less time, and the
    process holds its peak."""

    peak_flops: Annotated[PositiveFloat | None, RESUMABLE] = None
    """Peak FLOP/s of one device, for the utilisation among the metrics; known for some devices if not given."""
    profile: Annotated[ProfileConfig | None, RESUMABLE] = None
    """Write a trace of these steps into the run's folder (`profile/`)."""
    memory_snapshot: Annotated[bool, RESUMABLE] = False
    """On CUDA: write a snapshot of all allocations into the run's folder when memory runs out."""

    @model_validator(mode="after")
    def _profiled_steps_are_taken(self) -> TrainerConfig:
        if self.profile is not None and self.profile.start + self.profile.steps > self.max_steps:
            raise ValueError(
                f"`profile` ends with step {self.profile.start + self.profile.steps}, and `max_steps` is "
                f"{self.max_steps}"
            )
        return self

    @field_validator("stop_signals")
    @classmethod
    def _can_wait(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in names if not re.fullmatch(r"SIG[A-Z0-9]+", name) or name in ("SIGKILL", "SIGSTOP")]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: names such as SIGTERM are expected, but none that cannot be caught")
        return names


class ParallelConfig(Section):
    """How the run is spread over processes; `docs/scaling.md` tells when to use what."""

    shard: PositiveInt = 1
    """Processes that hold one copy of every network between them (FSDP2); it divides the number of processes."""
    replicate: PositiveInt | None = None
    """Copies of that. Derived (processes / shard); if given, it must be right."""
    context: PositiveInt = 1
    """Processes that share one sample, each with a part of its tokens (Ulysses); it divides the number of processes."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward: `full` keeps each block's input alone, `selective` also what attention and
    every second matrix product gave."""
    sync_every_micro_batch: bool = False
    """Reduce sharded gradients after every micro-batch: more traffic, but no whole gradient is kept meanwhile."""
    keep_gathered: Literal["none", "frozen", "all"] = "none"
    """Networks whose blocks stay whole after their first use, which saves traffic and costs memory: `frozen` for good,
    `all` also the trained ones, until the next backward pass is over. Without `shard` all networks are whole anyway."""
    offload: Literal["none", "frozen", "all"] = "none"
    """Networks that live in the host's memory and visit the device block by block; needs `shard` above 1."""
    timeout: PositiveFloat = 600.0
    """Seconds that a process waits for the others before the run ends with an error."""

    @model_validator(mode="after")
    def _offload_is_sharded(self) -> ParallelConfig:
        if self.offload != "none" and self.shard == 1:
            raise ValueError(f"offload {self.offload!r} moves blocks as sharding does: it needs shard above 1")
        if self.offload != "none" and self.keep_gathered != "none":
            raise ValueError(
                f"offload {self.offload!r} frees the device of what keep_gathered {self.keep_gathered!r} keeps there: "
                f"set one of them to none"
            )
        return self


class EMAConfig(Section):
    """Averaged weights; the student's are what is saved as the result."""

    enabled: bool = True
    """Whether to keep them."""
    roles: tuple[str, ...] = ("student",)
    """Whose; trained roles alone have some."""
    decay: float = Field(default=0.98, ge=0.0, lt=1.0)
    """Per update of the role."""
    start_step: NonNegativeInt = 0
    """Up to this step the average is a copy of the live weights."""


class CheckpointConfig(Section):
    """What survives a restart."""

    every: NonNegativeInt = 0
    """Steps between two checkpoints; 0 saves none but the result."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""
    keep_every: NonNegativeInt = 0
    """Those of every this-many-th step are kept as well; 0 keeps none of them."""
    asynchronous: bool = False
    """Write in a thread: training waits for the copy to host memory alone."""
