"""Sound in files, with PyAV: a track beside a video's pictures, or a WAV file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain, islice
from math import ceil, gcd
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fastvideo.data.faults import VideoError
from fastvideo.data.sound_clock import Clock, checked, entered, runs
from fastvideo.distillation.sound import Sound
from fastvideo.files import replacing

LAYOUTS = {1: "mono", 2: "stereo"}
"""Names of the channels, by their number."""
COVERED = 0.95
"""Least share of a clip that its sound has to cover; the rest is silent. Tracks end a packet before their video."""


class SoundTrack:
    """One sound in a container that is written; :meth:`finish` comes behind the pictures.

    Args:
        container: the open file.
        sound: of one sample, ``[1, channels, samples]``.
        codec: how it is stored.
    """

    def __init__(self, container: Any, sound: Sound, codec: str = "aac") -> None:
        self._container, self._sound = container, sound
        self._layout = LAYOUTS[sound.waveform.shape[1]]
        self._stream = container.add_stream(codec, rate=sound.rate, layout=self._layout)

    def finish(self) -> None:
        """Encode the sound."""
        (waveform,) = np.ascontiguousarray(self._sound.waveform.clamp(-1, 1).float().cpu().numpy())
        frame = av.AudioFrame.from_ndarray(waveform, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts = self._sound.rate, 0
        for one in (frame, None):
            self._container.mux(self._stream.encode(one))


def read_sound(path: Path, start: float, seconds: float, rate: int, channels: int) -> Sound:
    """The sound of a file between ``start`` and ``start + seconds``, resampled, in that many channels.

    Raises:
        VideoError: if there is none, it cannot be decoded as one, or it covers less than :data:`COVERED` of that time:
            gaps in its clock stay silent.
    """
    length = round(seconds * rate)
    wanted, heard = np.zeros((channels, length), np.float32), np.zeros(length, bool)
    try:
        with ExitStack() as opened:
            for place, samples in _placed(opened, path, start, rate, channels):
                if place >= length:
                    break
                part = slice(max(0, place), max(0, place + samples.shape[1]))
                wanted[:, part] = samples[:, max(0, -place) :][:, : len(heard[part])]
                heard[part] = True
    except av.error.FFmpegError as error:
        raise VideoError(f"its sound cannot be decoded: {error.strerror}") from error
    if heard.sum() < COVERED * length:
        raise VideoError(f"its sound covers {heard.sum() / rate:.2f} s of a clip of {seconds:.2f} s")
    return Sound(torch.from_numpy(wanted)[None], rate)


def _placed(opened: ExitStack, path: Path, start: float, rate: int, channels: int) -> Iterator[tuple[int, Any]]:
    """Samples ``[channels, n]``, each with the place of its first one, counted from the time ``start``.

    They begin near that time where the file can be entered there, and with the track elsewhere.
    """
    container, stream = _track(opened, path)
    head = list(islice(checked(container.decode(stream)), 2))
    if not head:
        return
    zero, clock = (container.start_time or 0) / av.time_base, Clock.of(head)
    frames = entered(container, stream, clock, Fraction(zero + start))
    if frames is None:
        container, stream = _track(opened, path)
        frames = container.decode(stream)
    origin = round((head[0].time - zero - start) * rate)
    for run in runs(checked(frames, head[0]), clock):
        first = next(run)
        for place, samples in _resampled(chain([first], run), clock.place(first), rate, channels):
            yield origin + place, samples


def _track(opened: ExitStack, path: Path) -> tuple[Any, Any]:
    """A file at its beginning, and its best track of sound."""
    container = opened.enter_context(av.open(str(path)))
    stream = container.streams.best("audio")
    if stream is None:
        raise VideoError("no sound")
    return container, stream


def _resampled(frames: Iterator[Any], place: int, rate: int, channels: int) -> Iterator[tuple[int, Any]]:
    """Samples ``[channels, n]`` of frames at another rate, each with the place of its first one at that rate.

    The grid of the new rate is that of the beginning of the track: the resampler hears silence from a common sample on
    until the first frame, whose place is ``place``. None of that silence comes out.
    """
    resampler = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
    first = next(frames)
    common = gcd(rate, first.sample_rate)
    number, missing = divmod(place, first.sample_rate // common)
    silence = [_silence(first, missing)] if missing else []
    at, begin = number * (rate // common), ceil(Fraction(place * rate, first.sample_rate))
    for one in chain.from_iterable(map(resampler.resample, chain(silence, [first], frames, [None]))):
        silent = max(0, begin - at)
        if silent < one.samples:
            yield at + silent, one.to_ndarray()[:, silent:]
        at += one.samples


def _silence(like: Any, samples: int) -> Any:
    frame = av.AudioFrame(format=like.format.name, layout=like.layout.name, samples=samples)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate, frame.time_base = like.sample_rate, like.time_base
    return frame


def write_wav(path: Path, sound: Sound) -> Path:
    """Write a sound in 16 bits, whole or not at all."""
    with replacing(path) as temporary, av.open(str(temporary), "w", format="wav") as container:
        SoundTrack(container, sound, "pcm_s16le").finish()
    return path
