"""Options of students that generate chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import WrapValidator

from fastvideo.distillation.chunks import Reach, spans
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.errors import UserError
from fastvideo.ranges import Fraction


def _checked_reach(value: object, validate: Callable[[object], Reach]) -> Reach:
    """Numbers that do not belong together are an error of the config, with the field's path."""
    try:
        return validate(value)
    except UserError as error:
        raise ValueError(str(error).removeprefix("reach.")) from error


class CausalOptions(MethodConfig):
    """Options of every method whose student generates chunk by chunk."""

    reach: Annotated[Reach, WrapValidator(_checked_reach)] = Reach()
    """Latent frames of a chunk, and those that it sees beside its own: `chunk`, `window` (past frames; all without it),
    `sink` (first frames that stay visible) and `positions` (`window` or `absolute`). Train with the window that you
    stream with."""
    context_time: Fraction = 0.0
    """Noise on the finished chunks that the next one sees, as a time in [0, 1]; 0 keeps them clean. Rollouts and
    streams have this much; teacher forcing draws times up to it, as the code of Causal Forcing does, so that the
    weights know less noise too, and can be the start of a method with less."""

    def check_frames(self, frames: int) -> None:
        """Check all options that count latent frames, for a model whose videos have ``frames`` of them.

        Raises:
            UserError: naming the option.
        """
        _check_chunk(frames, self.reach)


class ForcedOptions(MethodConfig):
    """Options of methods for whole videos that train chunk by chunk too, on the clean chunks before each."""

    reach: Annotated[Reach | None, WrapValidator(_checked_reach)] = None
    """Latent frames of a chunk, and those that it sees beside its own: the student then generates chunk by chunk, and
    trains by teacher forcing, as its teacher did. Whole videos without it."""
    context_time: Fraction = 0.0
    """With a `reach`, noise on the finished chunks, up to this time in [0, 1]; streams have this much."""
    allow_bidirectional_teacher: bool = False
    """With a `reach`, take a teacher whose folder does not say that it generates chunk by chunk."""

    def check_frames(self, frames: int) -> None:
        """Check that a video has a chunk.

        Raises:
            UserError: if it has none.
        """
        if self.reach is not None:
            _check_chunk(frames, self.reach)


def _check_chunk(frames: int, reach: Reach) -> None:
    try:
        spans(frames, reach.chunk)
    except UserError as error:
        raise UserError(f"method.{error}") from error
