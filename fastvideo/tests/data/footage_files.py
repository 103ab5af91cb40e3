"""Video files of every kind, made with PyAV: container, codec, frame times, display matrix, colours, transparency."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

FFMPEG = shutil.which("ffmpeg")
Picture = npt.NDArray[np.uint8]
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}


def grey(number: int) -> Picture:
    """A flat picture that tells its number."""
    return np.full((32, 32, 3), 8 + 5 * number, np.uint8)


def corners(number: int) -> Picture:
    """``[64, 96, 3]`` whose four corners differ, so that every turn of it shows; it darkens with ``number``."""
    y, x = np.mgrid[:64, :96]
    picture = np.stack([x * 2, y * 3, np.full_like(x, 255 - 8 * number)], axis=-1).astype(np.uint8)
    picture[:16, :24] = 255
    return picture


def half_transparent(number: int) -> Picture:
    """:func:`corners` with a transparent left half, which hides a bright colour."""
    picture = np.dstack([corners(number), np.full((64, 96), 255, np.uint8)])
    picture[:, :48] = (255, 200, 100, 0)
    return picture


def write(
    path: Path,
    frames: int = 12,
    rate: int = 24,
    picture: Callable[[int], Picture] = corners,
    codec: str | None = None,
    pixels: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
    b_frames: int = 0,
    **context: Any,
) -> Path:
    """Write pictures; ``context`` are further attributes of the encoder."""
    first = picture(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or CODECS[path.suffix], rate=rate, options=dict(options or {}))
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], pixels
        stream.codec_context.max_b_frames = b_frames
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number in range(frames):
            pixel = picture(number)
            frame = av.VideoFrame.from_ndarray(pixel, format="rgba" if pixel.shape[2] == 4 else "rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def with_matrix(source: Path, path: Path, matrix: Sequence[float]) -> Path:
    """A copy of an MP4 file with the display matrix ``(a, b, c, d)`` in its track header, as cameras write it."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(number * 65536) for number in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)
    return path


@cache
def chosen(count: int, rate: Fraction | int, fps: int, delay: int = 0) -> list[int]:
    """Which of ``count`` frames libavfilter's ``fps`` takes from an exact clock that starts ``delay`` frames late."""
    graph = av.filter.Graph()
    tick = 1 / Fraction(rate)
    source = graph.add("buffer", f"video_size=2x2:pix_fmt=gray16le:time_base={tick}:pixel_aspect=1/1")
    graph.link_nodes(source, graph.add("fps", f"fps={fps}"), graph.add("buffersink")).configure()
    taken = []
    for number in [*range(count), None]:
        frame = None
        if number is not None:
            frame = av.VideoFrame.from_ndarray(np.full((2, 2), number, np.uint16), format="gray16le")
            frame.pts, frame.duration, frame.time_base = number + delay, 1, tick
        graph.push(frame)
        while True:
            try:
                taken.append(int(graph.pull().to_ndarray()[0, 0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                break
    return taken


def greys_of_program(path: Path, fps: int) -> list[float]:
    """Mean grey of each frame of ``ffmpeg -vf fps=R``."""
    command = [
        str(FFMPEG),
        "-v",
        "error",
        "-i",
        str(path),
        "-vf",
        f"fps={fps},scale=32:32:flags=area",
        "-pix_fmt",
        "gray",
    ]
    raw = subprocess.run([*command, "-f", "rawvideo", "-"], capture_output=True, check=True).stdout
    means: list[float] = np.frombuffer(raw, np.uint8).reshape(-1, 32 * 32).mean(axis=1).tolist()
    return means
