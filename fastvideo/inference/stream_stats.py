"""Figures of a stream: times of its latest chunks, frames per second, memory."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

RECENT = 64
"""Chunks over which times are taken."""
Part = Literal["commit", "denoise", "decode"]


@dataclass(frozen=True)
class StreamStats:
    """Figures of a stream; times are medians of its latest chunks, in milliseconds.

    Attributes:
        frames: video frames so far.
        chunks: finished chunks.
        first_frame_ms: from ``open`` to the first frames; ``None`` before them.
        chunk_ms: of one chunk, the sum of its parts.
        commit_ms: of reading the chunk before into the past, and of prompt switches.
        denoise_ms: of the network's calls from noise to clean latents.
        decode_ms: of the decoder, with the frames on the host.
        fps: video frames per second of work; time in which nobody asks for a chunk does not count.
        past_bytes: memory of the past.
        decoder_bytes: memory of the decoder's state.
    """

    frames: int
    chunks: int
    first_frame_ms: float | None
    chunk_ms: float
    commit_ms: float
    denoise_ms: float
    decode_ms: float
    fps: float
    past_bytes: int
    decoder_bytes: int


class Clock:
    """Times of the parts of each chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._opened = device, time.perf_counter()
        self._now: dict[Part, float] = {}
        self._recent: deque[tuple[dict[Part, float], int]] = deque(maxlen=RECENT)
        self._chunks = 0
        self._first: float | None = None

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Measure a part of the chunk."""
        begin = time.perf_counter()
        yield
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._now[name] = time.perf_counter() - begin

    def finish(self, frames: int, *, made: bool = True) -> None:
        """Note a chunk of so many video frames; the times of one that was given are not of its making."""
        if made:
            self._recent.append((self._now, frames))
        self._now, self._chunks = {}, self._chunks + 1
        if frames and self._first is None:
            self._first = time.perf_counter() - self._opened

    def read(self, frames: int, past_bytes: int, decoder_bytes: int) -> StreamStats:
        """Figures now, also while another thread finishes chunks."""
        recent = list(self._recent)
        parts = {name: _median([times[name] for times, _ in recent if name in times]) for name in get_args(Part)}
        spent = sum(sum(times.values()) for times, _ in recent)
        return StreamStats(
            frames=frames,
            chunks=self._chunks,
            first_frame_ms=None if self._first is None else 1000 * self._first,
            chunk_ms=sum(parts.values()),
            commit_ms=parts["commit"],
            denoise_ms=parts["denoise"],
            decode_ms=parts["decode"],
            fps=sum(count for _, count in recent) / spent if spent else 0.0,
            past_bytes=past_bytes,
            decoder_bytes=decoder_bytes,
        )


def _median(seconds: list[float]) -> float:
    """Median in milliseconds; 0 of none."""
    return 1000 * statistics.median(seconds) if seconds else 0.0
