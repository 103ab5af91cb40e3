"""Config sections of the loop and its runtime, and the base of those of families."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import (
    field_validator,
    model_validator,
)

from fastvideo.distillation.config.base import RESUMABLE, Section
from fastvideo.ranges import Flops, NonNegativeInt, PositiveFloat, PositiveInt, Seconds, Threads

Level = Literal["closed form", "tiny equality", "tiny distillation", "real weights"]
"""Proof of a family: equal to a formula; equal to its stock pipeline on tiny random weights; distilled on tiny trained
ones; distilled on published ones."""


class AdapterConfig(Section):
    """Base of every family's options."""

    path: str = "tiny"
    """Weights: a model folder or a name; each family says what it accepts."""
    own_sizes: ClassVar[frozenset[str]] = frozenset()
    """Sizes whose default fits every model of the family; others are named for each model."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipeline classes (``_class_name`` in ``model_index.json``) that ``path`` may hold."""
    exporter: ClassVar[str] = ""
    """``package.module:Class`` of the exporter, for pipelines that the registry has none for."""
    reversed_time: ClassVar[bool] = False
    """The network's own time falls towards pure noise."""
    level: ClassVar[Level] = "tiny equality"
    """Proof that the family has passed."""


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
    """CPU seconds of this process inside steps after which the run ends, whatever else the machine does; 0: none."""
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
