"""From a video file to clips of the size that a model takes: frame rate, crop, resize, length. PyAV decodes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastvideo.errors import UserError

Frames = npt.NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]
RESIZE = "BICUBIC"
"""libswscale's filter; it averages over all source pixels when it makes a frame smaller."""


class VideoError(Exception):
    """Reason to skip a video; it is listed."""


@dataclass(frozen=True)
class Size:
    """A clip's size: pixels and frames."""

    height: int
    width: int
    num_frames: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """``480x832x81``: height, width, frames.

        Raises:
            UserError: for anything else.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", part) for part in parts):
            raise UserError(f"--buckets: {text!r} is not HEIGHTxWIDTHxFRAMES, such as 480x832x81")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"


@dataclass(frozen=True)
class Policy:
    """Cut and fit of a video.

    Attributes:
        sizes: the sizes to choose from: the nearest aspect ratio, and of those the longest that the video fills.
        fit: ``crop`` fills the frame and cuts what hangs over on both sides, ``pad`` shows all with black bars,
            ``stretch`` changes the aspect ratio.
        fps: frame rate, by repeating or dropping frames; ``None`` keeps every frame.
        every_clip: cut the whole video into clips instead of its beginning alone.
    """

    sizes: tuple[Size, ...]
    fit: Fit = "crop"
    fps: float | None = None
    every_clip: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {**asdict(self), "sizes": [str(size) for size in self.sizes], "resize": RESIZE.lower()}


@dataclass(frozen=True)
class Clip:
    """Frames ``[T, H, W, 3]`` of a video, its frame rate, and which clip of the video it is."""

    frames: Frames
    fps: float
    number: int

    @property
    def tensor(self) -> Tensor:
        """Float32 ``[3, T, H, W]`` in ``[-1, 1]``."""
        return torch.from_numpy(self.frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def read_clips(path: Path, policy: Policy) -> Iterator[Clip]:
    """The clips of a video; decodes no more frames than they need.

    Raises:
        VideoError: if decoding fails, or the video is too short for every size of its aspect ratio; with both numbers.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            yield from _clips_of(container, policy)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"cannot be decoded: {str(error).splitlines()[0].removeprefix('[Errno ')}") from error


def _clips_of(container: Any, policy: Policy) -> Iterator[Clip]:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # processes run in parallel instead
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if rate <= 0:
        raise VideoError("no frame rate")
    decoded = enumerate(container.decode(stream))
    timed = ((frame, i / rate if frame.time is None else frame.time) for i, frame in decoded)
    frames = (frame for frame, _ in timed) if policy.fps is None else resampled(timed, policy.fps, 1 / rate)
    first = next(iter(frames), None)
    if first is None:
        raise VideoError("no frame")
    sizes = nearest_sizes(policy.sizes, aspect_of(first, stream))
    fitted = (fit_frame(frame, sizes[0], policy.fit, stream) for frame in chain([first], frames))
    yield from _cut(fitted, sizes, policy, policy.fps or rate)


def _cut(fitted: Iterator[Frames], sizes: list[Size], policy: Policy, fps: float) -> Iterator[Clip]:
    """Stacks of as many frames as the longest size that fits; only whole ones."""
    frames = list(islice(fitted, sizes[-1].num_frames))
    fitting = [size.num_frames for size in sizes if size.num_frames <= len(frames)]
    if not fitting:
        at = "" if policy.fps is None else f" at {policy.fps:g} fps"
        raise VideoError(f"too short: {len(frames)} frames{at}, {sizes[0].num_frames} are needed")
    length, number = fitting[-1], 0
    yield Clip(np.stack(frames[:length]), fps, number)
    if not policy.every_clip:
        return
    rest = chain(frames[length:], fitted)
    while len(frames := list(islice(rest, length))) == length:
        number += 1
        yield Clip(np.stack(frames), fps, number)


def nearest_sizes(sizes: Iterable[Size], aspect: float) -> list[Size]:
    """The sizes of the aspect ratio (width / height) nearest to a video's, the shortest first."""
    nearest = min(sizes, key=lambda s: (abs(math.log(s.width / s.height / aspect)), s.height))
    return sorted(
        (s for s in sizes if (s.height, s.width) == (nearest.height, nearest.width)), key=lambda s: s.num_frames
    )


def aspect_of(frame: Any, stream: Any) -> float:
    """Width / height on a player: with the pixels' aspect ratio and a phone's rotation."""
    aspect = frame.width / frame.height * float(stream.sample_aspect_ratio or 1)
    return 1 / aspect if frame.rotation % 180 else aspect


def resampled(frames: Iterable[tuple[Any, float]], fps: float, duration: float) -> Iterator[Any]:
    """The frame on screen at each of the times 0, 1/fps, 2/fps, ...; ``duration`` is the last frame's."""
    shown, start, end, due = None, 0.0, 0.0, 0
    for frame, time in frames:
        start = time if shown is None else start
        while shown is not None and due / fps < time - start - 1e-6:
            yield shown
            due += 1
        shown, end = frame, time - start + duration
    while shown is not None and due / fps < end - 1e-6:
        yield shown
        due += 1


def fit_frame(frame: Any, size: Size, fit: Fit, stream: Any) -> Frames:
    """One frame as uint8 ``[H, W, 3]`` RGB of that size, upright."""
    turned = frame.rotation % 180 != 0
    scale_h, scale_w = size.height, size.width
    aspect = aspect_of(frame, stream)
    if fit != "stretch" and (aspect > size.width / size.height) == (fit == "crop"):
        scale_w = max(1, round(size.height * aspect))
    elif fit != "stretch":
        scale_h = max(1, round(size.width / aspect))
    shape = (scale_w, scale_h) if turned else (scale_h, scale_w)
    scaled = frame.reformat(width=shape[1], height=shape[0], format="rgb24", interpolation=RESIZE).to_ndarray()
    upright: Frames = np.rot90(scaled, frame.rotation // 90)
    return np.ascontiguousarray(_padded(_cropped(upright, size), size))


def _cropped(image: Frames, size: Size) -> Frames:
    top, left = max(0, image.shape[0] - size.height) // 2, max(0, image.shape[1] - size.width) // 2
    return image[top : top + size.height, left : left + size.width]


def _padded(image: Frames, size: Size) -> Frames:
    high, wide = size.height - image.shape[0], size.width - image.shape[1]
    return np.pad(image, ((high // 2, high - high // 2), (wide // 2, wide - wide // 2), (0, 0)))
