"""From a video or an image to clips of the size that a model takes: frame rate, crop, resize, length."""

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

from fastvideo.data.colours import check_colours, has_alpha, is_wide, over, to_bt709
from fastvideo.data.faults import VideoError
from fastvideo.data.footage import Footage, deinterlaced, open_footage, rate_of, resampled
from fastvideo.data.turns import turn_of
from fastvideo.errors import UserError

Frames = npt.NDArray[np.uint8]
Timed = tuple[Frames, int]
"""A picture and its time."""
Fit = Literal["crop", "pad", "stretch"]
RESIZE = "BICUBIC"
"""libswscale's filter; it averages over all source pixels when it makes a frame smaller."""


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
        sizes: the sizes to choose from: the nearest aspect ratio, and of those the longest that the video fills. An
            image has one frame whatever they say; sizes of one frame are its own, if there are any.
        fit: ``crop`` fills the frame and cuts what hangs over on both sides, ``pad`` shows all with black bars,
            ``stretch`` changes the aspect ratio.
        fps: frame rate, by repeating or dropping frames; ``None`` keeps every frame.
        every_clip: cut the whole video into clips instead of its beginning alone.
        background: RGB behind transparent pixels.
    """

    sizes: tuple[Size, ...]
    fit: Fit = "crop"
    fps: float | None = None
    every_clip: bool = False
    background: tuple[int, int, int] = (0, 0, 0)

    def to_dict(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {**asdict(self), "sizes": [str(size) for size in self.sizes], "resize": RESIZE.lower()}


@dataclass(frozen=True)
class Clip:
    """Frames ``[T, H, W, 3]`` of a video, its frame rate, which clip of the video it is, and if it is an image.

    ``start`` is where it begins in the file, in seconds; ``None`` behind a jump of the file's clock.
    """

    frames: Frames
    fps: float
    number: int
    still: bool = False
    start: float | None = None

    @property
    def tensor(self) -> Tensor:
        """Float32 ``[3, T, H, W]`` in ``[-1, 1]``."""
        return torch.from_numpy(self.frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def read_clips(path: Path, policy: Policy) -> Iterator[Clip]:
    """The clips of a video, or an image as a clip of one frame; decodes no more frames than they need.

    Raises:
        VideoError: if decoding fails, or the video is too short for every size of its aspect ratio; with both numbers.
    """
    try:
        with open_footage(path) as footage:
            yield from _still(footage, policy) if footage.still else _clips_of(footage, policy)
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot be decoded: {error.strerror}") from error
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot be decoded: {str(error).splitlines()[0]}") from error


def _still(footage: Footage, policy: Policy) -> Iterator[Clip]:
    frame = next(chain.from_iterable(footage.shots), None)
    if frame is None:
        raise VideoError("no frame")
    own = [size for size in policy.sizes if size.num_frames == 1] or policy.sizes
    size = nearest_sizes(own, aspect_of(frame, footage.pixel_aspect))[0]
    picture = fit_frame(frame, size, policy, footage.pixel_aspect)
    yield Clip(picture[None], policy.fps or 1.0, 0, still=True)


def _clips_of(footage: Footage, policy: Policy) -> Iterator[Clip]:
    """Clips of each shot; those that are too short for one are left out if there is another."""
    number, parts, longest = 0, 0, _TooShort(-1, 0)
    for shot in footage.shots:
        parts += 1
        try:
            for run in _runs(shot, footage, policy):
                rate, start = policy.fps or _rate(run, footage), _start(run, footage, policy) if parts == 1 else None
                yield Clip(np.stack([picture for picture, _ in run]), rate, number, start=start)
                number += 1
                if not policy.every_clip:
                    return
        except _TooShort as short:
            longest = max(longest, short, key=lambda one: one.frames)
    if not number:
        raise VideoError(longest.text(parts, policy.fps) if parts else "no frame")


class _TooShort(Exception):
    def __init__(self, frames: int, needed: int) -> None:
        super().__init__()
        self.frames, self.needed = frames, needed

    def text(self, parts: int, fps: float | None) -> str:
        rate = "" if fps is None else f" at {fps:g} fps"
        where = "" if parts == 1 else f" in the longest of {parts} parts between jumps of its clock"
        return f"too short: {self.frames} frames{rate}{where}, {self.needed} are needed"


def _runs(shot: Iterator[Any], footage: Footage, policy: Policy) -> Iterator[list[Timed]]:
    """Runs of as many frames as the longest size that the shot fills; only whole ones."""
    whole = deinterlaced(shot, footage.tick)
    frames = iter(whole if policy.fps is None else resampled(whole, footage.tick, policy.fps))
    first = next(frames, None)
    if first is None:
        raise _TooShort(0, min(size.num_frames for size in policy.sizes))
    sizes = nearest_sizes(policy.sizes, aspect_of(first, footage.pixel_aspect))
    fitted = ((fit_frame(f, sizes[0], policy, footage.pixel_aspect), f.pts) for f in chain([first], frames))
    run = list(islice(fitted, sizes[-1].num_frames))
    fitting = [size.num_frames for size in sizes if size.num_frames <= len(run)]
    if not fitting:
        raise _TooShort(len(run), sizes[0].num_frames)
    length = fitting[-1]
    rest = chain(run[length:], fitted)
    run = run[:length]
    while len(run) == length:
        yield run
        run = list(islice(rest, length))


def _rate(run: list[Timed], footage: Footage) -> float:
    """Frames per second of a run by its own clock."""
    seconds = (run[-1][1] - run[0][1]) * footage.tick
    return float((len(run) - 1) / seconds) if seconds > 0 else float(footage.rate)


def _start(run: list[Timed], footage: Footage, policy: Policy) -> float:
    """Seconds from the file's beginning to a run's."""
    return float(run[0][1] * (footage.tick if policy.fps is None else 1 / rate_of(policy.fps)))


def nearest_sizes(sizes: Iterable[Size], aspect: float) -> list[Size]:
    """The sizes of the aspect ratio (width / height) nearest to a video's, the shortest first."""
    nearest = min(sizes, key=lambda s: (abs(math.log(s.width / s.height / aspect)), s.height))
    return sorted(
        (s for s in sizes if (s.height, s.width) == (nearest.height, nearest.width)), key=lambda s: s.num_frames
    )


def aspect_of(frame: Any, pixel_aspect: float) -> float:
    """Width / height on a player: with the pixels' aspect ratio and a phone's rotation."""
    aspect: float = frame.width / frame.height * pixel_aspect
    return 1 / aspect if turn_of(frame).transposed else aspect


def fit_frame(frame: Any, size: Size, policy: Policy, pixel_aspect: float = 1.0) -> Frames:
    """One frame as uint8 ``[H, W, 3]`` RGB of that size, as a player shows it.

    Raises:
        VideoError: for colours or a rotation that cannot be shown.
    """
    scale_h, scale_w, fit = size.height, size.width, policy.fit
    aspect, turn = aspect_of(frame, pixel_aspect), turn_of(frame)
    if fit != "stretch" and (aspect > size.width / size.height) == (fit == "crop"):
        scale_w = max(1, round(size.height * aspect))
    elif fit != "stretch":
        scale_h = max(1, round(size.width / aspect))
    shape = (scale_w, scale_h) if turn.transposed else (scale_h, scale_w)
    upright = turn.upright(_scaled(frame, *shape, policy.background))
    return np.ascontiguousarray(_padded(_cropped(upright, size), size))


def _scaled(frame: Any, height: int, width: int, background: tuple[int, int, int]) -> Frames:
    check_colours(frame)
    opaque = over(frame, background) if has_alpha(frame.format.name) else frame
    wide = is_wide(frame)
    kind = "rgb48le" if wide else "rgb24"
    scaled = opaque.reformat(width=width, height=height, format=kind, interpolation=RESIZE, threads=1)
    pixels: Frames = scaled.to_ndarray()
    return to_bt709(pixels, frame) if wide else pixels  # type: ignore[arg-type]


def _cropped(image: Frames, size: Size) -> Frames:
    top, left = max(0, image.shape[0] - size.height) // 2, max(0, image.shape[1] - size.width) // 2
    return image[top : top + size.height, left : left + size.width]


def _padded(image: Frames, size: Size) -> Frames:
    high, wide = size.height - image.shape[0], size.width - image.shape[1]
    if not (high or wide):
        return image
    return np.pad(image, ((high // 2, high - high // 2), (wide // 2, wide - wide // 2), (0, 0)))
