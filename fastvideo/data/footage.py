"""From a video file to its frames with exact times: the best stream, cut where its clock jumps. PyAV decodes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, groupby, islice
from math import gcd
from operator import itemgetter
from pathlib import Path
from typing import Any

import av

from fastvideo.data.faults import VideoError
from fastvideo.data.stills import Pictures, is_image, read_pictures

GAP_SECONDS, GAP_FRAMES = 1, 10
"""A clock has a gap where it stands still, or jumps back, for longer than both: seconds, and usual frames."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the transparency of WebM, which FFmpeg's own leave out."""


@dataclass(frozen=True)
class Footage:
    """Frames of a file.

    Attributes:
        shots: runs of frames without a gap in their clock, each with ``pts`` in ``tick``; read them in turn.
        tick: unit of ``pts`` and ``duration``, seconds.
        rate: frames per second by the file's own word.
        pixel_aspect: width / height of a pixel.
        still: True for one picture.
    """

    shots: Iterator[Iterator[Any]]
    tick: Fraction
    rate: Fraction
    pixel_aspect: float = 1.0
    still: bool = False


@contextmanager
def open_footage(path: Path) -> Iterator[Footage]:
    """Open a video or an image; frames are decoded as they are asked for.

    Raises:
        VideoError: if it has no frame that can be shown.
    """
    if is_image(path):
        yield _of_pictures(read_pictures(path))
        return
    with av.open(str(path)) as container:
        yield _of_container(container, path)


def _of_pictures(pictures: Pictures) -> Footage:
    clock = Clock(Fraction(1, 1000), pictures.rate)
    return Footage(shots_of(pictures.frames, clock), clock.tick, pictures.rate, still=pictures.still)


def _of_container(container: Any, path: Path) -> Footage:
    stream = best_stream(container)
    rate = stream.guessed_rate or stream.average_rate
    if not rate or not stream.time_base:
        raise VideoError("no frame rate")
    start = round(Fraction(container.start_time or 0, av.time_base) / stream.time_base)
    clock = Clock(stream.time_base, rate, start, in_decoding_order="avi" in container.format.name)
    frames, still = _decoded(container, stream), False
    if path.suffix.lower() == ".gif":
        head = list(islice(frames, 2))
        frames, still = chain(head, frames), len(head) == 1
    aspect = float(stream.sample_aspect_ratio or 1)
    return Footage(shots_of(frames, clock), clock.tick, stream.average_rate or rate, aspect, still)


def best_stream(container: Any) -> Any:
    """The largest moving picture; covers and thumbnails are none.

    Raises:
        VideoError: if there is none, or no decoder for it.
    """
    flags = av.stream.Disposition
    covers = flags.attached_pic | flags.timed_thumbnails | flags.still_image
    moving = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not moving:
        raise VideoError("no video stream" + (", only a cover picture" if container.streams.video else ""))
    known = [stream for stream in moving if stream.codec_context is not None]
    if not known:
        raise VideoError("no decoder for its video stream")
    return max(known, key=lambda s: (s.codec_context.width * s.codec_context.height, s.disposition & flags.default))


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    context = stream.codec_context
    alpha = {name.lower(): value for name, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if alpha and context.name in ALPHA_DECODERS:
        context = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
        context.extradata = stream.codec_context.extradata
    context.thread_count = 1  # processes run in parallel instead
    for packet in container.demux(stream):
        yield from context.decode(packet)


class Clock:
    """Exact times of decoded frames.

    A container may round times (milliseconds in Matroska), lack or scramble them. A time within one unit of a whole
    number of frames is taken for that, so that equal videos have equal times in every container.

    Args:
        time_base: the container's unit.
        rate: frames per second.
        start: zero of the first shot, in that unit: the start of the file, as for ``ffmpeg``.
        in_decoding_order: the container stores no time of display (AVI); what libavformat makes of B-frames is not
            in order.
    """

    def __init__(
        self, time_base: Fraction, rate: Fraction, start: int | None = None, in_decoding_order: bool = False
    ) -> None:
        self.unit, self.rate, self.in_decoding_order = time_base, rate, in_decoding_order
        self.tick = common_divisor(time_base, 1 / rate)
        self.snaps = max(self.tick.numerator, self.tick.denominator) < 2**31 and 1 / rate >= 4 * time_base
        self.tick = self.tick if self.snaps else time_base
        self.shot, self._start, self._origin = 0, start, 0
        self._last: int | None = None
        self._intervals: deque[float] = deque(maxlen=32)
        self._order = _Order()

    def stamp(self, frame: Any) -> int:
        """Set ``pts``, ``duration`` and ``time_base`` of the next frame; returns the number of its shot."""
        raw = self._time_of(frame)
        if self._last is None:
            self._begin(raw, raw if self._start is None else self._start)
        elif frame.is_corrupt or self._is_gap(float((raw - self._last) * self.unit)):
            self.shot += 1
            self._begin(raw, raw)
        self._last = raw
        elapsed = self._snapped((raw - self._origin) * self.unit) + (self._origin - self._zero) * self.unit
        frame.pts, frame.time_base = int(elapsed / self.tick), self.tick
        frame.duration = int(self._shown(frame.duration or 0) / self.tick)
        return self.shot

    def _begin(self, origin: int, zero: int) -> None:
        self._origin, self._zero = origin, zero

    def _time_of(self, frame: Any) -> int:
        known = frame.dts if self.in_decoding_order else self._order.time_of(frame.pts, frame.dts)
        if known is not None:
            return int(known)
        period = max(1, round(1 / self.rate / self.unit))
        return (self._start or 0) if self._last is None else self._last + period

    @property
    def _longest(self) -> float:
        """Longest time in seconds that a frame may be on screen."""
        usual = statistics.median(self._intervals) if self._intervals else float(1 / self.rate)
        return max(GAP_SECONDS, GAP_FRAMES * usual)

    def _is_gap(self, interval: float) -> bool:
        gap = abs(interval) > self._longest
        if interval > 0:
            self._intervals.append(interval)  # a gap too: a file that shows every picture for seconds has none
        return gap

    def _snapped(self, elapsed: Fraction) -> Fraction:
        nearest = round(elapsed * self.rate) / self.rate
        return nearest if self.snaps and abs(nearest - elapsed) <= self.unit else elapsed

    def _shown(self, duration: int) -> Fraction:
        """Seconds on screen of a frame that the container shows for ``duration`` units; 0 if it does not say."""
        seconds, usual = duration * self.unit, 1 / self.rate
        if seconds <= 0 or abs(seconds - usual) <= self.unit or seconds > self._longest:
            return usual if self.snaps else max(self.unit, round(usual / self.unit) * self.unit)
        return seconds


class _Order:
    """Choice between a frame's time and that of its packet: whichever went back less often (libavcodec's rule)."""

    def __init__(self) -> None:
        self.last_pts = self.last_dts = -(2**63)
        self.bad_pts = self.bad_dts = 0

    def time_of(self, pts: int | None, dts: int | None) -> int | None:
        if dts is not None:
            self.bad_dts += dts <= self.last_dts
            self.last_dts = dts
        if pts is not None:
            self.bad_pts += pts <= self.last_pts
            self.last_pts = pts
        return pts if dts is None or (pts is not None and self.bad_pts <= self.bad_dts) else dts


def common_divisor(one: Fraction, other: Fraction) -> Fraction:
    """The longest time that both are whole multiples of."""
    return Fraction(
        gcd(one.numerator * other.denominator, other.numerator * one.denominator), one.denominator * other.denominator
    )


def shots_of(frames: Iterable[Any], clock: Clock) -> Iterator[Iterator[Any]]:
    """Runs of frames without a gap, whole frames alone: a damaged one ends a run."""
    stamped = ((clock.stamp(frame), frame) for frame in frames)
    for _, run in groupby(stamped, key=itemgetter(0)):
        yield (frame for _, frame in run if not frame.is_corrupt)


def deinterlaced(frames: Iterable[Any], tick: Fraction) -> Iterator[Any]:
    """One whole frame for each that is marked as two fields (``bwdif``); the others as they are."""
    for (interlaced, *_), run in groupby(frames, key=_kind_of_scan()):
        if not interlaced:
            yield from run
            continue
        for frame in filtered(run, tick, "bwdif", "mode=send_frame:deint=interlaced"):
            ratio = frame.time_base / tick
            frame.pts, frame.duration = int(frame.pts * ratio), int(frame.duration * ratio)
            frame.time_base = tick
            yield frame


def _kind_of_scan() -> Callable[[Any], tuple[Any, ...]]:
    """A key that stays interlaced once it is: telecine marks only some frames, and each needs its neighbours."""
    seen = False

    def key(frame: Any) -> tuple[Any, ...]:
        nonlocal seen
        seen = seen or frame.interlaced_frame
        return seen, frame.width, frame.height, frame.format.name

    return key


def resampled(frames: Iterable[Any], tick: Fraction, fps: float) -> Iterator[Any]:
    """The frames at ``fps``, as ``ffmpeg -vf fps=R`` chooses them."""
    rate = rate_of(fps)
    return filtered(frames, tick, "fps", f"fps={rate.numerator}/{rate.denominator}")


def rate_of(fps: float) -> Fraction:
    """A frame rate as a player counts it, such as 24000 / 1001."""
    return Fraction(fps).limit_denominator(1001)


def filtered(frames: Iterable[Any], tick: Fraction, name: str, options: str) -> Iterator[Any]:
    """Frames through a filter of libavfilter; their ``pts`` are in ``tick``."""
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        return
    graph = av.filter.Graph()
    source = f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base={tick}:pixel_aspect=1/1"
    colours = f":colorspace={first.colorspace}:range={first.color_range}"
    graph.link_nodes(graph.add("buffer", source + colours), graph.add(name, options), graph.add("buffersink"))
    graph.configure()
    for frame in chain([first], rest, [None]):
        graph.push(frame)
        yield from _ready(graph)


def _ready(graph: Any) -> Iterator[Any]:
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield frame
