"""Bases of every config section. Pure values, below methods, families and engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastvideo.distillation.types import Need
from fastvideo.ranges import Beta, LearningRate, NonNegativeFloat, NonNegativeInt


class Section(BaseModel):
    """Base of every section: frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    written_as: ClassVar[Mapping[str, Any]] = {}
    """Keys and types that a file or flag may hold instead of fields; a validator converts them."""

    @classmethod
    def rivals(cls, key: str) -> tuple[str, ...]:
        """Keys of this section that a flag for ``key`` replaces."""
        return ()


class Resumable:
    """Marker of a field or section that a resumed run may change: it does not affect the steps that were taken."""


RESUMABLE = Resumable()


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
    reversed_time: ClassVar[bool] = False
    """The network's own time falls towards pure noise."""
    level: ClassVar[Level] = "tiny equality"
    """Proof that the family has passed."""


class MethodConfig(Section):
    """Base of every method's options."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Abilities that these options need of the families."""

    def check_frames(self, frames: int) -> None:
        """Check options against the ``frames`` latent frames of the model's videos; most methods have none to check."""


OptimizerKind = Literal["adamw", "radam"]


class OptimizerOptions(Section):
    """Options of an optimizer besides its learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Momenta."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    decay_steps: Annotated[NonNegativeInt, RESUMABLE] = 0
    """Optimizer steps of the cosine decay to zero after the warm-up; 0 keeps the rate constant. A resumed run may
    extend it: the rate goes on at the same update of the longer decay."""

    def optimizer_of(self, learning_rate: float, kind: OptimizerKind = "adamw") -> OptimizerConfig:
        """These options at a learning rate."""
        options = self.model_dump(include=set(OptimizerOptions.model_fields))
        return OptimizerConfig(learning_rate=learning_rate, kind=kind, **options)


class OptimizerConfig(OptimizerOptions):
    """Optimizer of one role."""

    learning_rate: LearningRate
    """Peak learning rate."""
    kind: OptimizerKind = "adamw"
    """`adamw`, or `radam` (arXiv 1908.03265), which warms its second moment up; consistency models use it."""


def ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    """Check that the second bound is not below the first."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range must not fall from its first value to its second, got {list(bounds)}")
    return bounds


Band = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(ordered)]
"""Lowest and highest ratio."""
Time = Annotated[float, Field(ge=0.0, le=1.0)]
TimeRange = Annotated[tuple[Time, Time], AfterValidator(ordered)]
"""Lower and upper time in [0, 1]."""
