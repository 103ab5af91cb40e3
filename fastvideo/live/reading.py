"""The judge of the tiny world on a stream: its readings frame by frame, and the frame from which they are as asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fastvideo.evaluation.streams.motion import centred, centres
from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes
from fastvideo.tiny.classifier import FRAMES, TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER

HOLD = 4
"""Frames for which all that was asked must be read before it counts."""
Reading = tuple[str, str, str]
"""Words for digit, colour and direction."""


class Reader:
    """Readings of a stream of the torus world, frame by frame."""

    def __init__(self) -> None:
        self._judge = TinyClassifier.load(CLASSIFIER_FOLDER)
        self._latest = torch.empty(3, 0, 0, 0)
        self._asked = Attributes()
        self._asked_at, self._run = 0, 0
        self.read_at: int | None = None
        """First frame from which all that was asked has been read, for :data:`HOLD` frames at least."""

    def ask(self, attributes: Attributes, frame: int, cut: bool = False) -> None:
        """Expect attributes from a frame on; ``cut`` if a new scene begins there."""
        self._asked, self._asked_at, self._run, self.read_at = attributes, frame, 0, None
        if cut:
            self._latest = self._latest[:, :0]

    @property
    def latency(self) -> int | None:
        """Frames of the new prompt until all that was asked was read; ``None`` before. A window of 9 frames sees a new
        motion in 5 of them at the earliest."""
        return None if self.read_at is None else self.read_at - self._asked_at + 1

    def see(self, first: int, frames: npt.NDArray[np.uint8]) -> list[Reading | None]:
        """Read the nine frames that end at each of ``frames`` ``[n, 32, 32, 3]``; ``first`` is the number of the first.

        ``None`` for the first eight frames of a scene.
        """
        new = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
        clip = torch.cat([self._latest, new], dim=1) if self._latest.shape[1] else new
        self._latest = clip[:, -(FRAMES - 1) :]
        if clip.shape[1] < FRAMES:
            return [None] * len(frames)
        windows = clip.unfold(1, FRAMES, 1).permute(1, 0, 4, 2, 3)[-len(frames) :]
        found = self._judge.read(centred(windows, centres(windows))).tolist()
        missing = len(frames) - len(found)
        for frame, reading in enumerate(found, first + missing):
            self._note(frame, reading)
        return [None] * missing + [in_words(reading) for reading in found]

    def _note(self, frame: int, reading: Sequence[int]) -> None:
        asked = (self._asked.digit, self._asked.colour, self._asked.direction)
        agree = all(want is None or want == found for want, found in zip(asked, reading, strict=True))
        self._run = self._run + 1 if agree else 0
        if self._run == HOLD and self.read_at is None:
            self.read_at = frame - HOLD + 1


def in_words(reading: Sequence[int]) -> Reading:
    """Indices of digit, colour and direction as words."""
    digit, colour, direction = reading
    return DIGITS[digit], COLOURS[colour], DIRECTIONS[direction]
