"""Bases of every config section. Pure values, below methods, families and engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt


class Section(BaseModel):
    """Base of every part: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    written_as: ClassVar[Mapping[str, Any]] = {}
    """Keys that a file or a flag may have instead of fields, with their types; a validator converts them."""

    @classmethod
    def rivals(cls, key: str) -> tuple[str, ...]:
        """Keys of this section that a flag for ``key`` takes the place of."""
        return ()


class Resumable:
    """Marks a field, or a whole section, that a resumed run may change: it cannot change what the run trains."""


RESUMABLE = Resumable()


class AdapterConfig(Section):
    """Base of every family's options."""

    path: str = "tiny"
    """Where the weights are; each family says what it accepts."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipeline classes (``_class_name`` in ``model_index.json``) that ``path`` may hold."""


class MethodConfig(Section):
    """Base of every method's options."""


OptimizerKind = Literal["adamw", "radam"]


class OptimizerConfig(Section):
    """The optimizer of one role."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    kind: OptimizerKind = "adamw"
    """`adamw`, or `radam` (arXiv 1908.03265), which warms its second moment up and is what consistency models use."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momenta."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Optimizer steps of the cosine that follows the warm-up, down to zero; 0 keeps the rate constant."""


def ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    """``bounds`` if they do not fall."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range does not fall from its first value to its second, got {list(bounds)}")
    return bounds


Time = Annotated[float, Field(ge=0.0, le=1.0)]
TimeRange = Annotated[tuple[Time, Time], AfterValidator(ordered)]
"""Two times in [0, 1] that do not fall."""
