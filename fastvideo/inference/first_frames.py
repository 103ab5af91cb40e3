"""Conditioning frames of a video, read from an image or a clip."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastvideo.data.clips import Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import LoadedModel


def first_frames(model: LoadedModel, image: Path | None) -> Tensor | None:
    """Float32 ``[1, 3, T, H, W]`` in ``[-1, 1]``, as many and as large as the model takes; ``None`` for text alone.

    Raises:
        UserError: for a missing or superfluous image, or an unreadable or short file.
    """
    count = max(of_frames(model.adapter.conditioner).first_frames)
    if image is None:
        if of_frames(model.adapter.conditioner).needs_frames:
            what = "an image" if count == 1 else f"a clip of {count} frames"
            raise UserError(f"the model in {model.source} needs {what}: give it with --image")
        return None
    if count == 0:
        raise UserError(f"--image {image}: the model in {model.source} generates from text alone")
    return read_first_frames(image, model.adapter.config.height, model.adapter.config.width, count)


def read_first_frames(path: Path, height: int, width: int, count: int) -> Tensor:
    """The first ``count`` frames of an image or clip as ``[1, 3, count, height, width]``, scaled to fill and cropped.

    Raises:
        UserError: for a missing or damaged file, or one with fewer frames.
    """
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    try:
        clip = next(read_clips(path, Policy((Size(height, width, count),))))
    except VideoError as error:
        raise UserError(f"image {path}: {error}") from error
    if len(clip.frames) < count:
        raise UserError(f"image {path}: too short: {len(clip.frames)} frames, {count} are needed")
    return clip.tensor[None]
