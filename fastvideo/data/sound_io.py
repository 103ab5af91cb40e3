"""Sound in files, with PyAV: a track beside a video's pictures, or a WAV file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
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

JUMP = 0.04
"""Largest difference in seconds between a frame's time and the end of the one before it that is not a gap."""


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
        with av.open(str(path)) as container:
            for place, samples in _placed(container, start, rate, channels):
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


def _placed(container: Any, start: float, rate: int, channels: int) -> Iterator[tuple[int, Any]]:
    """Samples ``[channels, n]``, each with the place of its first one, counted from the time ``start``."""
    stream = container.streams.best("audio")
    if stream is None:
        raise VideoError("no sound")
    zero = (container.start_time or 0) / av.time_base
    for run in _runs(checked(container.decode(stream))):
        resampler = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
        first = next(run)
        place = round((first.time - zero - start) * rate)
        for frame in chain([first], run, [None]):
            for one in resampler.resample(frame):
                yield place, one.to_ndarray()
                place += one.samples


def _runs(frames: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Frames that follow each other without a jump of the clock of more than :data:`JUMP`."""
    number, end = 0, None

    def run_of(frame: Any) -> int:
        nonlocal number, end
        number += end is not None and abs(frame.time - end) > JUMP
        end = frame.time + frame.samples / frame.sample_rate
        return number

    return (run for _, run in groupby(frames, run_of))


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
