"""Config sections of the loop and its runtime."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from fastvideo.distillation.config.base import RESUMABLE, Section
from fastvideo.ranges import (
    Beta,
    Flops,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Processes,
    RelativeDeviation,
    Seconds,
    Threads,
)


class ProfileConfig(Section):
    """Steps that torch's profiler records."""

    start: NonNegativeInt = 10
    """Finished steps before the first recorded one."""
    steps: PositiveInt = 3
    """Number of recorded steps."""


class TrainerConfig(Section):
    """Training loop."""

    max_steps: Annotated[PositiveInt, RESUMABLE] = 1000
    """Steps of the run; in DMD2 most of them update the critic alone."""
    max_cpu_seconds: Annotated[Seconds, RESUMABLE] = 0.0
    """CPU time of this process for steps, without validation and checkpoints, after which the run ends early; 0 sets no
    limit. Other work on the machine does not count."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per step; the effective batch is this x batch size x processes."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which each role's gradient is clipped."""
    optimizer_states: Literal["float32", "8bit"] = "float32"
    """Precision of AdamW's moments: `8bit` takes a quarter of the memory, is slower on a CPU, and needs torchao (extra
    `eightbit`); see `docs/scaling.md`."""
    non_finite: Annotated[Literal["raise", "skip"], RESUMABLE] = "raise"
    """Reaction to a non-finite loss or gradient: stop with an error, or skip the step."""
    max_skips: Annotated[NonNegativeInt, RESUMABLE] = 10
    """Consecutive non-finite steps that `skip` allows before the run stops."""
    stop_signals: Annotated[tuple[str, ...], RESUMABLE] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """Signals that stop the run at the next safe point, with a checkpoint; a second one stops it at once."""
    watchdog_seconds: Annotated[Seconds, RESUMABLE] = 1800.0
    """Seconds without a finished step, or network call of a validation, on any process, after which the run ends and
    leaves the stacks of all processes in its folder; 0 waits for ever."""
    log_every: Annotated[PositiveInt, RESUMABLE] = 10
    """Steps per line of metrics."""
    threads: Annotated[Threads, RESUMABLE] = 0
    """CPU threads of torch; 0 is torch's default."""
    keep_freed_memory: Annotated[bool, RESUMABLE] = False
    """Keep freed tensor memory in the process for reuse (CPU, Linux): faster, but the process stays at its peak."""
    peak_flops: Annotated[Flops | None, RESUMABLE] = None
    """Peak FLOP/s of one device, for the utilisation among the metrics; some devices are known without it."""
    profile: Annotated[ProfileConfig | None, RESUMABLE] = None
    """Steps whose trace is written into the run's folder (`profile/`)."""
    slim_result: Annotated[bool, RESUMABLE] = False
    """Link the result's text encoder and VAE to the base model's folder instead of storing them again; only for this
    machine, see `docs/export.md`."""
    memory_snapshot: Annotated[bool, RESUMABLE] = False
    """Write a snapshot of all CUDA allocations into the run's folder when memory runs out."""

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
    """Layout of the run over processes; see `docs/scaling.md`."""

    shard: Processes = 1
    """Processes that share one copy of every network (FSDP2); it divides the number of processes."""
    replicate: Processes | None = None
    """Copies of the networks; processes / shard if not given, and checked otherwise."""
    context: Processes = 1
    """Processes that share one sample, each with a part of its tokens (Ulysses); it divides the number of processes."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward: `full` keeps only the inputs of blocks, `selective` also the results of
    attention and of every second matrix product."""
    sync_every_micro_batch: bool = False
    """Reduce sharded gradients after every micro-batch: more traffic, but no whole gradients in memory."""
    keep_gathered: Literal["none", "frozen", "all"] = "none"
    """Sharded networks whose blocks stay whole after their first use, which saves traffic and costs memory: `frozen`
    permanently, `all` also the trained ones until the end of the next backward pass."""
    offload: Literal["none", "frozen", "all"] = "none"
    """Networks in host memory that are moved to the device block by block; needs `shard` above 1."""
    timeout: Seconds = Field(default=600.0, gt=0)
    """Seconds a process waits for others before the run ends with an error."""

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


class PostHocConfig(Section):
    """Averages of the student that are stored while it trains, so that `fastvideo average` makes any other afterwards
    (arXiv 2312.02696); see `docs/averages.md`."""

    stds: Annotated[tuple[RelativeDeviation, ...], Field(min_length=2, max_length=8)] = (0.05, 0.1)
    """Widths of the stored averages, relative to the updates so far (sigma_rel in the paper). Each costs a copy of the
    trained weights in memory."""
    every: PositiveInt = 4
    """Updates of the student per snapshot, doubled whenever there would be more than `keep`."""
    keep: Annotated[int, Interval(ge=4, le=1024)] = 16
    """Most updates with a snapshot beside the last one; with fewer, wide averages are less exact."""
    precision: Literal["float16", "float32"] = "float16"
    """Numbers in the files (folder `snapshots`); averages are kept in float32."""

    @field_validator("stds")
    @classmethod
    def _differ(cls, stds: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{std:g}" for std in stds}) < len(stds):
            raise ValueError(f"the averages must differ, got {list(stds)}")
        return stds


class EMAConfig(Section):
    """Averaged weights; those of the student are the result."""

    enabled: bool = True
    """Keep averages."""
    roles: tuple[str, ...] = ("student",)
    """Trained roles that have an average."""
    decay: Beta = 0.98
    """Decay per update of the role."""
    start_step: NonNegativeInt = 0
    """Step up to which the average copies the live weights."""
    post_hoc: PostHocConfig | None = None
    """Snapshots of the student from which an average is chosen after the run; `{}` takes the defaults."""


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
