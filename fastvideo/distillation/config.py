"""One validated config per run: YAML in, frozen objects out, and an error that names the right key for a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from fastvideo.distillation.adapters.base import AdapterConfig
from fastvideo.distillation.config_errors import explain
from fastvideo.distillation.config_loop import (
    CheckpointConfig,
    EMAConfig,
    HealthConfig,
    TrackingConfig,
    TrainerConfig,
    ValidationConfig,
)
from fastvideo.distillation.config_sections import ParallelConfig, RoleConfig, Section
from fastvideo.distillation.methods.base import MethodConfig
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import UserError


class LadderConfig(Section):
    """The student's noise levels: real `times`, a published list of `steps`, or a `count`; see `times`."""

    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Decreasing times in (0, 1]; the final 0 is implied. In YAML also as `steps: [1000, 750, 500, 250]` with
    `shift: 5.0` and `warp: true|false`, or as `count: 50` with `shift: 3.0`: converted here, once."""

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, value: object) -> object:
        if not isinstance(value, Mapping) or not {"steps", "count"} & set(value):
            return value
        form = "steps" if "steps" in value else "count"
        allowed = {"steps", "shift", "warp"} if form == "steps" else {"count", "shift"}
        if set(value) - allowed:
            raise ValueError(
                f"`{form}` goes with {sorted(allowed - {form})} alone, not with {sorted(set(value) - allowed)}"
            )
        try:
            shift = float(value.get("shift", 1.0))
            if form == "count":
                return {"times": Ladder.uniform(int(value["count"]), shift=shift).times}
            return {"times": Ladder.from_steps(value["steps"], shift=shift, warp=value.get("warp", True)).times}
        except (TypeError, UserError) as error:
            raise ValueError(f"{error} (given: {dict(value)})") from error

    @field_validator("times")
    @classmethod
    def _valid(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        try:
            return Ladder(times).times
        except UserError as error:
            raise ValueError(str(error)) from error


class DataConfig(Section):
    """What the run trains on: preprocessed videos, the embedded world, or prompts alone."""

    path: str = "tiny"
    """`tiny` (the embedded world of moving digits), or what `fastvideo preprocess` made: a Parquet file, or a folder of
    them in FastVideo's public schema. A method that needs no videos reads captions and text embeddings alone."""
    prompts: str | None = None
    """Instead of `path`: a text file, one prompt per line."""
    buckets: bool = False
    """Take videos of every size in the dataset, each batch of one size; otherwise all must have the model's."""
    size: PositiveInt = 4096
    """Samples of the tiny world per epoch."""
    cache: str = "outputs/cache"
    """Where latents of the tiny world are kept once computed."""
    faults: Literal["raise", "skip"] = "raise"
    """What to do about a file or row of a dataset that cannot be read: stop, or leave it out and list it."""
    max_faults: NonNegativeInt = 100
    """With `skip`: the run stops when a process has more than this to leave out."""
    batch_size: PositiveInt = 32
    """Samples per process and micro-batch."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.prompts is not None and self.path != "tiny":
            raise ValueError(f"give `path` ({self.path!r}) or `prompts` ({self.prompts!r}), not both")
        return self


AdapterT = TypeVar("AdapterT", bound=AdapterConfig)
MethodT = TypeVar("MethodT", bound=MethodConfig)


class RunConfig(Section, Generic[AdapterT, MethodT]):
    """A run, complete: saved beside its result, and runs again from there."""

    distill_model: str
    """The model family; `fastvideo list` shows all."""
    distill_method: str
    """The algorithm; `fastvideo list` shows all."""
    output: str
    """The run's folder; it must be new, unless the run is resumed or told to overwrite."""
    seed: int = 0
    """Seed of every random draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto` takes CUDA if there is one."""
    model: AdapterT
    """The model family's options."""
    roles: dict[str, RoleConfig]
    """Which networks take part, by role."""
    ladder: LadderConfig = LadderConfig()
    """The student's noise levels."""
    method: MethodT
    """The algorithm's options."""
    data: DataConfig = DataConfig()
    """What the run trains on."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over processes."""
    ema: EMAConfig = EMAConfig()
    """Averaged weights of the student."""
    validation: ValidationConfig = ValidationConfig()
    """Samples while training."""
    health: HealthConfig = HealthConfig()
    """What each validation looks at besides, and when to raise an alarm."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What survives a restart."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: if it is not there, not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path}: a mapping of keys is expected, found {type(content).__name__}")
    return content


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def validate(schema: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """``values`` as a config.

    Raises:
        UserError: one line per problem, with the key's full path and, for an unknown key, the nearest right one.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [explain(schema, dict(problem)) for problem in error.errors()]
        raise UserError("\n  ".join([f"config {source}:", *lines])) from error
