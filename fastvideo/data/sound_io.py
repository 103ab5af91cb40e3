"""Sound in files, with PyAV: a track beside a video's pictures, or a WAV file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fastvideo.data.faults import VideoError
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
        VideoError: if there is none, it cannot be decoded as one, or it covers less than :data:`COVERED` of that time.
    """
    try:
        with av.open(str(path)) as container:
            first, samples = _samples(container, start + seconds, rate, channels)
    except av.error.FFmpegError as error:
        raise VideoError(f"its sound cannot be decoded: {error.strerror}") from error
    wanted = np.zeros((channels, round(seconds * rate)), np.float32)
    begin = round((first - start) * rate)  # of the samples, in what is wanted
    kept = samples[:, max(0, -begin) :][:, : max(0, wanted.shape[1] - max(0, begin))]
    if kept.shape[1] < COVERED * wanted.shape[1]:
        raise VideoError(f"its sound covers {kept.shape[1] / rate:.2f} s of a clip of {seconds:.2f} s")
    wanted[:, max(0, begin) : max(0, begin) + kept.shape[1]] = kept
    return Sound(torch.from_numpy(wanted)[None], rate)


def _samples(container: Any, end: float, rate: int, channels: int) -> tuple[float, Any]:
    """Time of the first sample, and the samples ``[channels, n]`` up to the time ``end`` or beyond."""
    stream = container.streams.best("audio")
    if stream is None:
        raise VideoError("no sound")
    resampler = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
    zero, first, count, parts = (container.start_time or 0) / av.time_base, 0.0, 0, list[Any]()
    for frame in chain(checked(container.decode(stream)), [None]):
        if frame is not None and not parts:
            first = frame.time - zero
        found = [one.to_ndarray() for one in resampler.resample(frame)]
        parts, count = [*parts, *found], count + sum(one.shape[1] for one in found)
        if first + count / rate >= end:
            break
    if not parts:
        raise VideoError("no sound")
    return first, np.concatenate(parts, axis=1)


def checked(frames: Iterable[Any]) -> Iterator[Any]:
    """The frames of one track.

    Raises:
        VideoError: for a frame without a time, or of other channels, rate or format than the first.
    """
    first = None
    for frame in frames:
        if frame.time is None:
            raise VideoError("its sound has no clock")
        kind = f"{frame.layout.name}, {frame.sample_rate} Hz, {frame.format.name}"
        first = first or kind
        if kind != first:
            raise VideoError(f"its sound changes from {first} to {kind}")
        yield frame


def write_wav(path: Path, sound: Sound) -> Path:
    """Write a sound in 16 bits, whole or not at all."""
    with replacing(path) as temporary, av.open(str(temporary), "w", format="wav") as container:
        SoundTrack(container, sound, "pcm_s16le").finish()
    return path
