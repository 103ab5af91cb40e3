"""Writing videos with PyAV: MP4 to watch, lossless animated images to embed, GIF for older viewers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastvideo.data.sound_io import SoundTrack
from fastvideo.distillation.sound import Sound
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing

Frames = npt.NDArray[np.uint8]
Rate = int | Fraction
"""Frames per second."""
FPS = 8


@dataclass(frozen=True)
class VideoFormat:
    """Encoding of a file type: container, codec, pixel format, media type and options."""

    container: str
    codec: str
    pixels: str
    mime: str
    codec_options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    fastest: int = 1000
    """Most frames per second."""
    has_sound: bool = False
    """It has room for a track of sound."""


FORMATS = {
    ".mp4": VideoFormat("mp4", "libx264", "yuv420p", "video/mp4", {"crf": "16"}, has_sound=True),
    ".gif": VideoFormat("gif", "gif", "pal8", "image/gif", {}, {"loop": "0"}, fastest=100),
    ".webp": VideoFormat("webp", "libwebp_anim", "bgra", "image/webp", {"lossless": "1"}, {"loop": "0"}),
    ".apng": VideoFormat("apng", "apng", "rgb24", "image/apng", {"pred": "mixed"}, {"plays": "0"}),
    ".png": VideoFormat("apng", "apng", "rgb24", "image/png", {"pred": "mixed"}, {"plays": "0"}),
}
"""Formats by suffix. Animated images loop for ever; WebP, APNG and PNG (the same file) are lossless."""


def video_format(path: Path | str, fps: Rate = FPS) -> VideoFormat:
    """The format that the suffix of ``path`` names.

    Raises:
        UserError: for any other suffix, a frame rate that it cannot hold, or a folder of that name; callers check
            before they spend time on a video.
    """
    if Path(path).is_dir():
        raise UserError(f"cannot write a video to {str(path)!r}: it is a folder; give the name of a file")
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"cannot write a video to {str(path)!r}: its name must end in one of {', '.join(FORMATS)}")
    if fps > FORMATS[suffix].fastest:
        raise UserError(f"a {suffix} file holds up to {FORMATS[suffix].fastest} frames per second, got {fps}")
    return FORMATS[suffix]


def write_video(path: Path | str, video: Tensor, fps: Rate = FPS, scale: int = 1, sound: Sound | None = None) -> Path:
    """Write ``video`` ``[3, T, H, W]`` in ``[-1, 1]`` to ``path``, whole or not at all; the suffix chooses the format.

    Args:
        fps: frames per second.
        scale: every pixel becomes a square of this side (nearest neighbour), so that a tiny video can be watched.
        sound: a track beside it, in a format that has one.

    Raises:
        UserError: for a suffix that is not in :data:`FORMATS`, or more frames per second than its format holds.
    """
    with writing_video(path, fps, scale, sound) as writer:
        writer.write(to_frames(video))
    return Path(path)


@contextmanager
def writing_video(
    path: Path | str, fps: Rate = FPS, scale: int = 1, sound: Sound | None = None
) -> Iterator[VideoWriter]:
    """Yield a writer of frames; the video replaces ``path`` at the end, and not at all if the body raises.

    Raises:
        UserError: as :func:`write_video`.
    """
    path, chosen = Path(path), video_format(path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, VideoWriter(str(temporary), chosen, fps, scale, sound) as writer:
        yield writer


def video_bytes(video: Tensor, suffix: str = ".apng", fps: int = FPS, scale: int = 1) -> bytes:
    """The file that :func:`write_video` would write, for embedding; ``.apng`` is exact and loops in every browser."""
    buffer = io.BytesIO()
    with VideoWriter(buffer, FORMATS[suffix], fps, scale) as writer:
        writer.write(to_frames(video))
    return buffer.getvalue()


class VideoWriter:
    """Encoder of one video, frame by frame; as a context it finishes the file. GIF and WebP appear at its end alone.

    Args:
        target: name of a file, or a buffer that can seek.
        fps, scale, sound: as for :func:`write_video`.
    """

    def __init__(
        self, target: str | io.BytesIO, chosen: VideoFormat, fps: Rate, scale: int, sound: Sound | None = None
    ) -> None:
        self._format, self._fps, self._scale, self._sound = chosen, fps, scale, sound
        self._track: SoundTrack | None = None
        self._container = av.open(target, "w", format=chosen.container, options=chosen.container_options)
        self._stream: Any = None
        self._palette: _Palette | None = None

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 ``[n, H, W, 3]``."""
        frames = _enlarged(frames, self._scale)
        if self._format.pixels == "yuv420p":
            frames = _even(frames)
        if self._stream is None:
            self._begin(*frames.shape[1:3])
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if self._palette is None:
                self._encode(picture)
            else:
                self._palette.push(picture)

    def _begin(self, height: int, width: int) -> None:
        chosen = self._format
        self._stream = self._container.add_stream(chosen.codec, rate=self._fps, options=chosen.codec_options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, chosen.pixels
        if self._sound is not None:
            self._track = SoundTrack(self._container, self._sound)
        if chosen.pixels == "pal8":
            self._palette = _Palette(height, width, self._fps)

    def _encode(self, picture: Any) -> None:
        self._container.mux(self._stream.encode(picture))

    def _finish(self) -> None:
        for picture in self._palette.pull() if self._palette is not None else ():
            self._encode(picture)
        self._encode(None)
        if self._track is not None:
            self._track.finish()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._stream is not None:
                self._finish()
        finally:
            self._container.close()


def to_frames(video: Tensor) -> Frames:
    """uint8 ``[T, H, W, 3]`` of a video ``[3, T, H, W]`` in ``[-1, 1]``."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video is [3, T, H, W], got {list(video.shape)}")
    frames = ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return np.ascontiguousarray(frames)


def _enlarged(frames: Frames, scale: int) -> Frames:
    return np.ascontiguousarray(frames.repeat(scale, axis=1).repeat(scale, axis=2))


def _even(frames: Frames) -> Frames:
    """Repeat the last row and column where a side is odd: 4:2:0 chroma comes in blocks of two."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


class _Palette:
    """GIF frames with one palette made for this video: the fixed 256 colours show bands."""

    def __init__(self, height: int, width: int, fps: Rate) -> None:
        graph = av.filter.Graph()
        size, tick = f"video_size={width}x{height}", f"time_base={1 / Fraction(fps)}"
        source = graph.add("buffer", f"{size}:pix_fmt=rgb24:{tick}:pixel_aspect=1/1")
        split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
        use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        self._graph, self._count = graph, 0

    def push(self, picture: Any) -> None:
        picture.pts, self._count = self._count, self._count + 1
        self._graph.push(picture)

    def pull(self) -> Iterator[Any]:
        self._graph.push(None)
        for _ in range(self._count):
            yield self._graph.pull()
