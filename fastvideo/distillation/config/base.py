"""Bases of every config section, and fields that several share. Pure values, below methods, families and engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import Need
from fastvideo.ranges import Beta, Fraction, GuidanceScale, LearningRate, NonNegativeFloat, NonNegativeInt


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


class MethodConfig(Section):
    """Base of every method's options."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Abilities that these options need of the families."""

    @property
    def flow_maps(self) -> tuple[str, ...]:
        """Roles that these options make read a second time ``r``."""
        return ()

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


Time = Annotated[float, Field(ge=0.0, le=1.0)]
TimeRange = Annotated[tuple[Time, Time], AfterValidator(ordered)]
"""Lower and upper time in [0, 1]."""


def _some(shares: tuple[float, ...]) -> tuple[float, ...]:
    """Check that the shares, if there are any, are not all zero."""
    if shares and not any(shares):
        raise ValueError(f"at least one ladder step needs a share above 0, got {list(shares)}")
    return shares


Shares = Annotated[tuple[NonNegativeFloat, ...], AfterValidator(_some)]
"""Shares of the ladder's steps, the noisiest first; they need not sum to 1, and none at all are equal ones."""


CONVENTIONS = {"standard": 0.0, "extra": 1.0}
"""Addition to the number of each convention that makes it standard."""
MOST = 1000.0
"""Largest guidance."""
ByTime = tuple[tuple[Fraction, GuidanceScale], ...]
"""Pairs ``(t, g)``, falling in ``t`` to 0: the guidance from each time up to the one before."""


def standard_guidance(value: object) -> object:
    """Convert guidance to the standard convention: a number or ``{"standard": g}`` is ``g``, ``{"extra": w}`` 1 + w."""
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or next(iter(value)) not in CONVENTIONS:
        raise ValueError(f"guidance is a number or one of {{standard: g}}, {{extra: w}}; got {value}")
    convention, number = next(iter(value.items()))
    if not isinstance(number, (int, float)):
        raise ValueError(f"guidance: {convention} needs a number, got {number!r}")
    return float(number) + CONVENTIONS[convention]


def by_time(value: object) -> GuidanceValue:
    """Convert a guidance, or pairs ``[[t, g], ...]``, to the standard convention; pairs that all agree are a number."""
    if not isinstance(value, (list, tuple)):
        return _scale(value)
    if not value or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise ValueError(f"guidance by time is a list of pairs such as [[0.875, 4.0], [0, 3.0]]; got {value!r}")
    pairs = tuple((_number(start), _scale(g)) for start, g in value)
    starts = [start for start, _ in pairs]
    if starts != sorted(set(starts), reverse=True) or starts[-1] != 0.0 or starts[0] > 1.0:
        raise ValueError(f"guidance by time: the times must fall from at most 1 to 0, got {starts}")
    numbers = {g for _, g in pairs}
    return numbers.pop() if len(numbers) == 1 else pairs


def _scale(value: object) -> float:
    number = _number(standard_guidance(value))
    if not 0.0 <= number <= MOST:
        raise ValueError(f"guidance must be from 0 to {MOST:g}, got {number}")
    return number


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"guidance is a number, or a list of pairs [t, g] of numbers, got {value!r}")
    return float(value)


Guidance = Annotated[GuidanceScale | ByTime, BeforeValidator(by_time)]
"""Guidance as a config field, of samplers and of teachers: a number or pairs by time."""
GuidanceNumber = Annotated[GuidanceScale, BeforeValidator(standard_guidance)]
"""Guidance that is the same at all times."""
