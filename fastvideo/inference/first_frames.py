"""Conditioning frames of a video, read from an image or a clip, and the beginning of a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvideo.data.clips import Clip, Frames, Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.chunks import spans
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import LoadedModel, OpenedModel
from fastvideo.inference.locks import lock_of
from fastvideo.wording import counted


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
    clip = _read(path, (Size(height, width, count),))
    if len(clip.frames) < count:
        raise UserError(f"image {path}: too short: {len(clip.frames)} frames, {count} are needed")
    return clip.tensor[None]


def read_beginning(path: Path, model: OpenedModel) -> Frames:
    """An image, or the longest beginning of a clip that is a video of up to ``num_frames``, scaled and cropped.

    Returns:
        uint8 ``[n, H, W, 3]``.

    Raises:
        UserError: for a missing or damaged file.
    """
    config, temporal = model.adapter.config, model.adapter.codec.temporal
    lengths = range(1, config.num_frames + 1, temporal)
    return _read(path, tuple(Size(config.height, config.width, count) for count in lengths)).frames


def given_chunks(model: LoadedModel, given: Frames, chunk: int, frames: int | None) -> tuple[Tensor, ...]:
    """Latents ``[1, C, c, H, W]`` of given frames, in chunks as a stream makes them; ``frames``: of the whole video.

    Raises:
        UserError: for frames of another size or type, too few for a chunk, or as many as the video.
    """
    config, codec = model.adapter.config, model.adapter.codec
    wanted = (len(given), config.height, config.width, 3)
    if given.dtype != np.uint8 or given.shape != wanted:
        size = f"[n, {config.height}, {config.width}, 3]"
        raise UserError(f"given: frames are uint8 {size}, got {given.dtype} {[*given.shape]}")
    latents, needed = latent_frames(len(given), codec.temporal), first_frame(chunk, codec.temporal)
    if latents < chunk:
        raise UserError(
            f"given: the first chunk of this model has {counted(needed, 'frame')}, and it never met a shorter one: "
            f"give so many or more, got {len(given)}"
        )
    if frames is not None and frames <= len(given):
        raise UserError(f"given: {len(given)} frames, and a video of {frames} has none behind them")
    video = torch.from_numpy(given).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with lock_of(codec):
        encoded = codec.encode(video).float()
    return torch.split(encoded, [end - start for start, end in spans(latents, chunk)], dim=2)


def _read(path: Path, sizes: tuple[Size, ...]) -> Clip:
    """The first clip of a file."""
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    try:
        return next(read_clips(path, Policy(sizes)))
    except VideoError as error:
        raise UserError(f"image {path}: {error}") from error
