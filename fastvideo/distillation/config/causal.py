"""Options of students that generate chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import WrapValidator, model_validator

from fastvideo.distillation.chunks import Reach, spans
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.types import Need
from fastvideo.errors import UserError
from fastvideo.ranges import Fraction


def _checked_reach(value: object, validate: Callable[[object], Reach]) -> Reach:
    """Numbers that do not belong together are an error of the config, with the field's path."""
    try:
        return validate(value)
    except UserError as error:
        raise ValueError(str(error).removeprefix("reach.")) from error


class StreamOptions(MethodConfig):
    """Options of every method whose student generates chunk by chunk, always or where its config has a ``reach``."""

    autoregressive_roles: ClassVar[tuple[str, ...]] = ()
    """Frozen roles that continue a past as the student does: their weights come from a model that was trained to."""
    reach: Reach | None
    context_time: Fraction

    @property
    def first_times(self) -> tuple[float, ...]:
        """Times of the first chunk of a stream; empty for those of the ladder."""
        return ()

    @property
    def trusts_teachers(self) -> bool:
        """True if teachers are taken whose model folder does not say that they generate chunk by chunk."""
        return False

    @property
    def switches(self) -> bool:
        """True if every sample needs a second prompt, for a switch in mid-video."""
        return False

    def check_frames(self, frames: int) -> None:
        """Check all options that count latent frames, for a model whose videos have ``frames`` of them.

        Raises:
            UserError: naming the option.
        """
        if self.reach is None:
            return
        try:
            spans(frames, self.reach.chunk)
        except UserError as error:
            raise UserError(f"method.{error}") from error


class CausalOptions(StreamOptions):
    """Options of methods for students that generate chunk by chunk."""

    needs = frozenset({"chunks"})
    reach: Annotated[Reach, WrapValidator(_checked_reach)] = Reach()
    """Latent frames of a chunk, and those that it sees beside its own: `chunk`, `window` (past frames; all without it),
    `sink` (first frames that stay visible) and `positions` (`window` or `absolute`). Train with the window that you
    stream with."""
    context_time: Fraction = 0.0
    """Noise on the finished chunks that the next one sees, as a time in [0, 1]; 0 keeps them clean. Rollouts and
    streams have this much; teacher forcing draws times up to it, as the code of Causal Forcing does, so that the
    weights know less noise too, and can be the start of a method with less."""


class ForcingOptions(CausalOptions):
    """Options of methods that train on a clean past or on a noisy one."""

    forcing: Literal["teacher", "diffusion"] = "teacher"
    """Past that a chunk is trained on: clean chunks, or noisy ones at times of their own."""

    @model_validator(mode="after")
    def _noise_of_a_clean_past(self) -> Self:
        if self.context_time and self.forcing == "diffusion":
            raise ValueError("`context_time` is noise on a clean past: `forcing: diffusion` has none, leave it out")
        return self


class ForcedOptions(StreamOptions):
    """Options of methods for whole videos that train chunk by chunk too, on the clean chunks before each."""

    autoregressive_roles = ("teacher",)
    reach: Annotated[Reach | None, WrapValidator(_checked_reach)] = None
    """Latent frames of a chunk, and those that it sees beside its own: the student then generates chunk by chunk, and
    trains by teacher forcing, as its teacher did. Whole videos without it."""
    context_time: Fraction = 0.0
    """With a `reach`, noise on the finished chunks, up to this time in [0, 1]; streams have this much."""
    allow_bidirectional_teacher: bool = False
    """With a `reach`, take a teacher whose folder does not say that it generates chunk by chunk."""

    @property
    def trusts_teachers(self) -> bool:
        return self.allow_bidirectional_teacher

    @property
    def chunk_needs(self) -> frozenset[Need]:
        """Abilities that a ``reach`` needs of the families."""
        return frozenset() if self.reach is None else frozenset({"chunks"})


def streaming(options: MethodConfig) -> StreamOptions | None:
    """The options of a student that generates chunk by chunk; ``None`` for one that makes whole videos at once."""
    return options if isinstance(options, StreamOptions) and options.reach is not None else None


def reach_of(options: MethodConfig) -> Reach | None:
    """Frames that a chunk of the student sees; ``None`` for a student that makes whole videos at once."""
    return options.reach if isinstance(options, StreamOptions) else None


def uses_switches(options: MethodConfig) -> bool:
    """True for a method whose streams switch prompts, as configured."""
    return isinstance(options, StreamOptions) and options.switches
