"""Choice of a model's judge: the tiny world knows its own videos, a teacher those of every other world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.frames import first_frame
from fastvideo.errors import UserError
from fastvideo.inference.loading import OpenedModel
from fastvideo.tiny.world import FRAMES, SIZE

TEACHER_JUDGES = "let its teacher judge, with --teacher TEACHER --prompts FILE --out FOLDER"
Shape = tuple[int, int, int]
"""Frames, height and width of a video."""


def video_shape(adapter: DistillAdapter[Any]) -> Shape:
    """Shape of a model's videos; a family without a height makes those of the tiny world."""
    codec, sizes = adapter.codec, adapter.config.model_dump()
    frames = sizes.get("num_frames") or first_frame(codec.latent_shape[1], codec.temporal)
    return frames, sizes.get("height", SIZE), sizes.get("width", SIZE)


def unjudged(adapter: DistillAdapter[Any]) -> str | None:
    """The reason for which the tiny world knows no truth of a model's videos; ``None`` if they are its own."""
    made, known = video_shape(adapter), (FRAMES, SIZE, SIZE)
    return None if made == known else f"it knows videos of {shown(known)}, and this model makes {shown(made)}"


def check_judged(name: str, model: OpenedModel) -> None:
    """Check that a model makes videos of the tiny world, before any is sampled.

    Raises:
        UserError: with the way to measure this one.
    """
    frames, height, width = made = video_shape(model.adapter)
    if made != (FRAMES, SIZE, SIZE):
        streams = frames > FRAMES and (height, width) == (SIZE, SIZE)
        raise UserError(
            f"evaluation compares with the tiny world's videos, {shown((FRAMES, SIZE, SIZE))}; {name} makes "
            f"{shown(made)}: {f'measure it with --long {frames}' if streams else TEACHER_JUDGES}"
        )


def check_validated(adapter: DistillAdapter[Any]) -> None:
    """Check that ``validation.world_prompts`` has a judge for a model's videos, before the first step.

    Raises:
        UserError: with what to give instead.
    """
    frames, height, width = made = video_shape(adapter)
    if frames < FRAMES or (height, width) != (SIZE, SIZE):
        raise UserError(
            f"validation.world_prompts: the tiny world judges videos of {shown((FRAMES, SIZE, SIZE))} and longer ones; "
            f"this model makes {shown(made)}: give validation.prompts"
        )


def shown(shape: Shape) -> str:
    """A shape in words."""
    frames, height, width = shape
    return f"{frames} frame{'s' if frames > 1 else ''} of {height}x{width}"


def measuring_command(student: str, model: Mapping[str, Any]) -> str:
    """The command that measures a student; ``model`` is that section of its recipe."""
    path, frames = model.get("path"), model.get("num_frames", FRAMES)
    if path not in EMBEDDED:
        return f"fastvideo evaluate {student} --teacher {path or 'TEACHER'} --prompts prompts.txt"
    return f"fastvideo evaluate {student}" + (f" --long {frames}" if frames > FRAMES else "")
