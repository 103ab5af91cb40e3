"""The sections of a config that say how a run goes, whatever it trains: loop, averages, validation, checkpoints."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fastvideo.distillation.config_sections import Section


class TrainerConfig(Section):
    """The loop."""

    max_steps: PositiveInt = 1000
    """Steps; every step trains the critic (or whatever the method trains each time) once."""
    max_cpu_seconds: NonNegativeFloat = 0.0
    """End sooner, with the step in which this one process has spent so much CPU time on steps: a budget that other work
    on the machine does not touch. Validation and checkpoints are not counted; 0 sets no limit."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per step; the effective batch is this x batch size x processes."""
    max_grad_norm: PositiveFloat = 1.0
    """Each role's gradient is clipped to this norm."""
    optimizer_states: Literal["float32", "8bit"] = "float32"
    """What AdamW keeps its moments in: `8bit` takes a quarter of the memory, is slower on a CPU, and needs torchao
    (extra `eightbit`); see `docs/scaling.md`."""
    non_finite: Literal["raise", "skip"] = "raise"
    """What to do about a loss or gradient that is not finite: stop, or leave that step out and go on."""
    max_skips: NonNegativeInt = 10
    """With `skip`: the run stops when more steps than this in a row were not finite."""
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """Signals that stop the run at the next safe point, with a checkpoint; a second one stops it at once."""
    watchdog_seconds: NonNegativeFloat = 1800.0
    """The run ends, with the stacks of all processes in its folder, when none of them finishes a step or a network call
    of a validation for this long; 0 waits for ever."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    threads: NonNegativeInt = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    keep_freed_memory: bool = False
    """On a CPU under Linux: memory that tensors free stays with the process and is used again: less time, and the
    process holds its peak."""

    @field_validator("stop_signals")
    @classmethod
    def _can_wait(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in names if not re.fullmatch(r"SIG[A-Z0-9]+", name) or name in ("SIGKILL", "SIGSTOP")]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: names such as SIGTERM are expected, but none that cannot be caught")
        return names


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


class ValidationConfig(Section):
    """Samples at fixed prompts and noise while training."""

    every: NonNegativeInt = 0
    """Steps between two validations; 0 means none."""
    prompts: tuple[str, ...] = ()
    """Prompts; the first eight are written as video."""
    images: tuple[str, ...] = ()
    """One image (or clip) per prompt, for a model that goes on from one."""
    world_prompts: NonNegativeInt = 0
    """This many prompts of the tiny world instead, scored by its classifier."""
    seed: int = 1234
    """Seed of the noise."""
    fps: PositiveInt = 8
    """Frames per second of the files."""

    @model_validator(mode="after")
    def _has_prompts(self) -> ValidationConfig:
        if self.every and not (self.prompts or self.world_prompts):
            raise ValueError("`every` is set: give `prompts`, or a number of `world_prompts`")
        if self.prompts and self.world_prompts:
            raise ValueError("give `prompts` or `world_prompts`, not both")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(f"`images` has {len(self.images)} files for {len(self.prompts)} prompts")
        return self


class HealthConfig(Section):
    """What is looked at in every validation, and when an alarm is raised; see `docs/health.md`."""

    enabled: bool = True
    """Whether to look."""
    prompts: PositiveInt = 8
    """So many of the validation's prompts."""
    seeds: PositiveInt = 2
    """Videos of each, from different noise."""
    teacher_steps: PositiveInt = 25
    """Steps of the teacher's videos, which are made once, at the first validation."""
    contrast: tuple[float, float] = (0.5, 2.0)
    """Below the first share of the teacher's contrast the student is washed out."""
    saturation: tuple[float, float] = (0.4, 1.8)
    """Outside these shares of the teacher's saturation the student is grey or over-saturated."""
    motion: tuple[float, float] = (0.5, 2.5)
    """Outside these shares of the teacher's motion the student freezes or flickers."""
    brightness: float = 0.15
    """Largest difference from the teacher's brightness, of 1."""
    colour: float = 0.1
    """Largest difference of a colour channel's deviation from grey, of 1."""
    grid: float = 1.6
    """Largest ratio to the teacher's steps at block borders."""
    diversity: float = 0.4
    """Smallest share of the teacher's difference between seeds."""
    latent_std: float = 2.5
    """Largest ratio to the spread of the teacher's latents."""
    update_balance: float = 0.5
    """How far the critic must move per step, over how far the student does."""
    gradient: float = 3.0
    """Largest RMS of the DMD gradient."""


class TrackingConfig(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """External trackers; `wandb` and `trackio` are optional dependencies of those names. None can stop the run."""
    project: str = "fastvideo"
    """Project at an external tracker."""
    name: str | None = None
    """Name there; the output folder's if not given."""


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
