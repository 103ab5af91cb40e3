"""Sound in files, with PyAV: a track beside a video's pictures, or a WAV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

from fastvideo.distillation.sound import Sound
from fastvideo.files import replacing

LAYOUTS = {1: "mono", 2: "stereo"}
"""Names of the channels, by their number."""


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


def write_wav(path: Path, sound: Sound) -> Path:
    """Write a sound in 16 bits, whole or not at all."""
    with replacing(path) as temporary, av.open(str(temporary), "w", format="wav") as container:
        SoundTrack(container, sound, "pcm_s16le").finish()
    return path
