"""Writing videos with PyAV: MP4 to watch, lossless animated images to embed, GIF for older viewers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastvideo.distillation.types import UserError
from fastvideo.files import replacing

Frames = npt.NDArray[np.uint8]
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


FORMATS = {
    ".mp4": VideoFormat("mp4", "libx264", "yuv420p", "video/mp4", {"crf": "16"}),
    ".gif": VideoFormat("gif", "gif", "pal8", "image/gif", {}, {"loop": "0"}, fastest=100),
    ".webp": VideoFormat("webp", "libwebp_anim", "bgra", "image/webp", {"lossless": "1"}, {"loop": "0"}),
    ".apng": VideoFormat("apng", "apng", "rgb24", "image/apng", {"pred": "mixed"}, {"plays": "0"}),
}
"""Formats by suffix. Animated images loop for ever; WebP and APNG are lossless."""


def video_format(path: Path | str, fps: int = FPS) -> VideoFormat:
    """The format that the suffix of ``path`` names.

    Raises:
        UserError: for any other suffix, or a frame rate that it cannot hold; callers check before they spend time on a
            video.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"cannot write a video to {str(path)!r}: its name must end in one of {', '.join(FORMATS)}")
    if fps > FORMATS[suffix].fastest:
        raise UserError(f"a {suffix} file holds up to {FORMATS[suffix].fastest} frames per second, got {fps}")
    return FORMATS[suffix]


def write_video(path: Path | str, video: Tensor, fps: int = FPS, scale: int = 1) -> Path:
    """Write ``video`` ``[3, T, H, W]`` in ``[-1, 1]`` to ``path``, whole or not at all; the suffix chooses the format.

    Args:
        fps: frames per second.
        scale: every pixel becomes a square of this side (nearest neighbour), so that a tiny video can be watched.

    Raises:
        UserError: for a suffix that is not in :data:`FORMATS`, or more frames per second than its format holds.
    """
    video_format(path, fps)
    path = Path(path)
    data = video_bytes(video, path.suffix, fps, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def video_bytes(video: Tensor, suffix: str = ".apng", fps: int = FPS, scale: int = 1) -> bytes:
    """The file that :func:`write_video` would write, for embedding; ``.apng`` is exact and loops in every browser."""
    chosen = video_format(f"video{suffix}")
    frames = to_frames(video, scale)
    if chosen.pixels == "yuv420p":
        frames = _even(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=chosen.container, options=chosen.container_options) as container:
        stream = container.add_stream(chosen.codec, rate=fps, options=chosen.codec_options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], chosen.pixels
        for frame in _paletted(frames, fps) if chosen.pixels == "pal8" else _plain(frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def to_frames(video: Tensor, scale: int = 1) -> Frames:
    """uint8 ``[T, scale H, scale W, 3]`` of a video ``[3, T, H, W]`` in ``[-1, 1]``."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video is [3, T, H, W], got {list(video.shape)}")
    frames = ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return np.ascontiguousarray(frames.repeat(scale, axis=1).repeat(scale, axis=2))


def _even(frames: Frames) -> Frames:
    """Repeat the last row and column where a side is odd: 4:2:0 chroma comes in blocks of two."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _plain(frames: Frames) -> Iterator[Any]:
    for frame in frames:
        yield av.VideoFrame.from_ndarray(frame, format="rgb24")


def _paletted(frames: Frames, fps: int) -> Iterator[Any]:
    """GIF frames with one palette made for this video: the fixed 256 colours show bands."""
    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base=1/{fps}:pixel_aspect=1/1")
    split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(_plain(frames)):
        frame.pts = index
        graph.push(frame)
    graph.push(None)
    for _ in frames:
        yield graph.pull()
