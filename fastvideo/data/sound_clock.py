"""The clock of a track of sound: places of its frames, to a sample, and the way into a long file.

A file is entered near a wanted time where its timestamps say, to a sample, how much sound lies before: in
:data:`INDEXED` containers, if the places of the frames there, by their times or on the grid of frames of one size
behind the first one, follow each other without a sample between. Any other track is decoded from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, groupby, islice, pairwise
from typing import Any

import av

from fastvideo.data.faults import VideoError

INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "wav")
"""Containers whose packets have times of their own, and that find a time by an index."""
PREROLL = 2
"""Least seconds that are decoded before the wanted time. AAC's and Vorbis' frames overlap with one before, MP3's reach
back by three, and Opus' predictions were the same to the bit after 31 packets, 0.62 s. (What nothing brings back: the
numbers that an AAC decoder draws for bands of noise.)"""
BACK = (3, 6, 12, 24)
"""Seconds before the wanted time at which an entry is looked for, until one is far enough: an index may be coarse."""
CHECKED = 32
"""Frames at an entry whose places must follow: so many that rounded times beside the grid show."""
JUMP = 0.04
"""Largest difference in seconds between a frame's time and the end of the one before it that is not a gap."""
SLACK = 1
"""Ticks of the clock by which a time may lie beside the grid: the first time is rounded, and so is this one."""


@dataclass(frozen=True)
class Clock:
    """Places of a track's frames, in samples behind its first one.

    Attributes:
        begin: time of the first frame in seconds.
        first, size: samples of the first frame, and of those behind it, if they are all alike.
        rate: samples per second.
        tick: seconds per unit of the timestamps.
    """

    begin: Fraction
    first: int
    size: int
    rate: int
    tick: Fraction

    @classmethod
    def of(cls, frames: list[Any]) -> Clock:
        """The clock of a track that begins with these frames, one or two."""
        first, tick = frames[0], Fraction(frames[0].time_base)
        return cls(first.pts * tick, first.samples, frames[-1].samples, first.sample_rate, tick)

    def place(self, frame: Any) -> int:
        """Samples before a frame, by its time."""
        return self._on_grid(frame) if self.fits(frame) else round(self._by_time(frame))

    def fits(self, frame: Any) -> bool:
        """True if the frame lies on the grid."""
        slack = SLACK * self.tick * self.rate
        return 4 * slack < self.size and abs(self._on_grid(frame) - self._by_time(frame)) <= slack

    def _by_time(self, frame: Any) -> Fraction:
        return (frame.pts * frame.time_base - self.begin) * self.rate

    def _on_grid(self, frame: Any) -> int:
        time = self._by_time(frame)
        return 0 if 2 * time < self.first else self.first + round((time - self.first) / self.size) * self.size


def entered(container: Any, stream: Any, clock: Clock, time: Fraction) -> Iterator[Any] | None:
    """Frames from :data:`PREROLL` before ``time`` or earlier, or ``None`` for a track that has no such entry.

    The container may be anywhere afterwards.
    """
    if container.format.name not in INDEXED:
        return None
    for back in BACK:
        if time - back <= clock.begin:
            return None
        try:
            container.seek(int((time - back) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            return None
        frames = checked(container.decode(stream))
        # A decoder may drop a part of the first frame behind a seek, as it does at the beginning of the track.
        head = list(islice(frames, 1 + CHECKED))[1:]
        if head and head[0].pts * stream.time_base <= time - PREROLL:
            return chain(head, frames) if _follow(clock, head) else None
    return None


def _follow(clock: Clock, frames: list[Any]) -> bool:
    """True for frames whose places, by their times, are as far from each other as their samples say."""
    places = [clock.place(frame) for frame in frames]
    return all(b - a == frame.samples for (a, b), frame in zip(pairwise(places), frames, strict=False))


def runs(frames: Iterator[Any], clock: Clock) -> Iterator[Iterator[Any]]:
    """Frames that follow each other without a jump of the clock: of more than :data:`JUMP`, or of whole frames."""
    number, end, expected = 0, None, 0

    def run_of(frame: Any) -> int:
        nonlocal number, end, expected
        place = clock.place(frame)
        lost = clock.fits(frame) and 2 * abs(place - expected) >= clock.size
        if end is None or abs(frame.time - end) > JUMP or lost:
            number, expected = number + 1, place
        end, expected = frame.time + frame.samples / frame.sample_rate, expected + frame.samples
        return number

    return (run for _, run in groupby(frames, run_of))


def checked(frames: Iterable[Any], like: Any | None = None) -> Iterator[Any]:
    """The frames of one track, which begins with the frame ``like`` or the first of them.

    Raises:
        VideoError: for a frame without a time, or of other channels, rate or format than the first.
    """
    first = None if like is None else _kind(like)
    for frame in frames:
        if frame.time is None:
            raise VideoError("its sound has no clock")
        first = first or _kind(frame)
        if _kind(frame) != first:
            raise VideoError(f"its sound changes from {first} to {_kind(frame)}")
        yield frame


def _kind(frame: Any) -> str:
    return f"{frame.layout.name}, {frame.sample_rate} Hz, {frame.format.name}"
