"""Observing streams as they come: per frame and per window, in a memory that does not grow with their length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastvideo.distillation.types import UserError
from fastvideo.evaluation.judge import frozen_classifier
from fastvideo.evaluation.streams.motion import centred, centres, ink, saturation
from fastvideo.tiny.classifier import FRAMES
from fastvideo.tiny.world import SIZE


@dataclass(frozen=True)
class SeenStreams:
    """Observations of ``N`` streams of ``T`` frames.

    Attributes:
        starts: first frames of the ``W`` windows that were read.
        positions: ``[N, T, 2]``, see :func:`~fastvideo.evaluation.streams.motion.centres`.
        ink, saturation: ``[N, T]``.
        read: labels of the judge ``[N, W, 3]``.
        features: of the judge ``[N, W, 64]``.
    """

    starts: tuple[int, ...]
    positions: Tensor
    ink: Tensor
    saturation: Tensor
    read: Tensor
    features: Tensor

    @classmethod
    def join(cls, parts: Iterable[SeenStreams]) -> SeenStreams:
        """All streams of several batches, in order."""
        parts = list(parts)
        names = [field.name for field in fields(cls) if field.name != "starts"]
        return cls(parts[0].starts, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    @property
    def frames(self) -> int:
        return self.ink.shape[1]

    def at(self, starts: Sequence[int]) -> SeenStreams:
        """The same streams with some of the windows."""
        places = [self.starts.index(start) for start in starts]
        return replace(self, starts=tuple(starts), read=self.read[:, places], features=self.features[:, places])


class StreamObserver:
    """Reads a batch of streams piece by piece.

    Args:
        starts: first frames of the windows to read, ascending.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts, self._count = tuple(starts), 0
        self._ahead = list(starts)
        self._last: Tensor | None = None
        self._frames: list[tuple[Tensor, Tensor, Tensor]] = []
        self._windows: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, frames: Tensor) -> None:
        """Take the next frames ``[B, 3, n, 32, 32]`` in ``[-1, 1]``, none from a decoder that waits for more latents.

        Raises:
            UserError: for frames of another size.
        """
        if tuple(frames.shape[-2:]) != (SIZE, SIZE):
            raise UserError(
                f"streams are measured on the tiny world, whose frames are {SIZE}x{SIZE}; this model makes "
                f"{frames.shape[-2]}x{frames.shape[-1]}"
            )
        for index in range(frames.shape[2]):
            self._add_one(frames[:, :, index : index + 1].float().cpu())

    def _add_one(self, frame: Tensor) -> None:
        self._last = frame if self._last is None else torch.cat([self._last, frame], dim=2)[:, :, -FRAMES:]
        self._frames.append((centres(frame), ink(frame), saturation(frame)))
        self._count += 1
        if self._ahead and self._count == self._ahead[0] + FRAMES:
            self._ahead.pop(0)
            self._windows.append(self._read(self._last))

    def _read(self, window: Tensor) -> tuple[Tensor, Tensor]:
        classifier = frozen_classifier()
        positions = torch.cat([frame[0] for frame in self._frames[-FRAMES:]], dim=1)
        features = classifier.features(centred(window, positions))
        return torch.stack([scores.argmax(1) for scores in classifier.heads(features)], 1), features

    def seen(self) -> SeenStreams:
        """All observations so far.

        Raises:
            UserError: if the streams ended before a window that was to be read.
        """
        if self._ahead:
            raise UserError(f"a window of {FRAMES} frames from frame {self._ahead[0]} needs a longer stream")
        positions, light, chroma = (torch.cat(values, dim=1) for values in zip(*self._frames, strict=True))
        read, features = (torch.stack(values, dim=1) for values in zip(*self._windows, strict=True))
        return SeenStreams(self.starts, positions, light, chroma, read, features)


def observe_streams(videos: Tensor, starts: Sequence[int]) -> SeenStreams:
    """Observe whole videos ``[N, 3, T, 32, 32]``."""
    observer = StreamObserver(starts)
    observer.add(videos)
    return observer.seen()
