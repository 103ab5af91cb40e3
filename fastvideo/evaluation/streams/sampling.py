"""Streams of a model, observed while they are made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from fastvideo.distillation.abilities import frame_decoder
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.sample import SamplerSpec, prompt_seeds
from fastvideo.evaluation.streams.observer import SeenStreams, StreamObserver
from fastvideo.evaluation.streams.world import StreamJudge
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.stream_batches import (
    Change,
    StreamBatch,
    StreamPiece,
    continued,
    stream_frames,
)
from fastvideo.tiny.classifier import FRAMES

FRAMES_TOGETHER = 8192
"""Frames of real streams that are drawn and encoded together: some hundred megabytes."""


@dataclass(frozen=True)
class RealStreams:
    """Real streams of the prompts through a codec: what they show, and their latents ``[N, C, F, H, W]``."""

    seen: SeenStreams
    latents: Tensor


@dataclass(frozen=True)
class SampledStreams:
    """Observed streams, the first of them ``[V, 3, T, H, W]``, and seconds per stream, the median over batches."""

    seen: SeenStreams
    videos: Tensor
    denoise_seconds: float
    seconds: float

    @classmethod
    def join(cls, parts: Sequence[SampledStreams]) -> SampledStreams:
        """The streams of several batches, in order."""
        videos = torch.cat([part.videos for part in parts])
        denoise, whole = median(part.denoise_seconds for part in parts), median(part.seconds for part in parts)
        return cls(SeenStreams.join(part.seen for part in parts), videos, denoise, whole)


def real_streams(model: LoadedModel, judge: StreamJudge, batch_size: int) -> RealStreams:
    """The prompts' real streams after the VAE: what a perfect model of the latents would show."""
    codec, seen, latents = model.adapter.codec, [], []
    together = max(1, min(batch_size, FRAMES_TOGETHER // judge.frames))
    with PatientBar("real streams through the VAE", len(judge.prompts)) as bar:
        for videos in judge.real_batches(together):
            encoded = codec.encode(videos.to(model.adapter.device))
            decode, observer = frame_decoder(codec), StreamObserver(judge.starts)
            for frame in torch.split(encoded, 1, dim=2):
                observer.add(decode(frame))
            seen.append(observer.seen())
            latents.append(encoded.cpu())
            bar(len(videos))
    return RealStreams(SeenStreams.join(seen), torch.cat(latents))


@dataclass(frozen=True)
class StreamSource:
    """A model under a sampler; prompt and ``seed`` determine a stream's noise, as everywhere.

    Attributes:
        name: on progress bars.
        frames: video frames of a stream.
        batch_size: streams made together.
    """

    name: str
    model: LoadedModel
    sampler: SamplerSpec
    frames: int
    seed: int
    batch_size: int

    def streams(
        self, prompts: Sequence[str], starts: Sequence[int], keep: int = 0, change: Change | None = None
    ) -> SampledStreams:
        """One stream per prompt, read at the windows ``starts``.

        Args:
            keep: first streams to return whole.
            change: switch of all prompts.
        """
        calls = self.sampler.calls_of(latent_frames(self.frames, self.model.adapter.codec.temporal))
        label = self.name if change is None else f"{self.name}, switches"
        with PatientBar(label, len(prompts) * calls) as bar:
            parts = []
            for rows, batch in self._batches(prompts, bar):
                wanted = max(0, min(keep - rows.start, len(rows)))
                own = None if change is None else replace(change, prompts=[change.prompts[row] for row in rows])
                parts.append(_observed(stream_frames(batch, self.frames, own), starts, wanted, len(rows)))
        return SampledStreams.join(parts)

    def on_real_pasts(self, prompts: Sequence[str], real: RealStreams, places: Sequence[int]) -> SeenStreams:
        """Windows that continue the prompts' real streams, one behind each of the latent frames ``places``.

        Each begins with the last real frame.
        """
        seen = []
        with PatientBar(f"{self.name}, on real pasts", len(prompts) * len(places)) as bar:
            for rows, batch in self._batches(prompts):
                windows = []
                for _, window in continued(batch, real.latents[rows.start : rows.stop], places, FRAMES - 1):
                    windows.append(_one_window(window))
                    bar(len(rows))
                seen.append(_side_by_side(windows))
        return SeenStreams.join(seen)

    def _batches(self, prompts: Sequence[str], bar: PatientBar | None = None) -> Iterator[tuple[range, StreamBatch]]:
        """Numbers of the prompts of each batch, and the batch."""
        seeds, size = prompt_seeds(self.seed, prompts), self.batch_size
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            batch = StreamBatch(self.model, self.sampler, prompts[start : rows.stop], seeds[start : rows.stop])
            yield rows, batch if bar is None else replace(batch, called=partial(bar, len(rows) * self._calls))

    @property
    def _calls(self) -> int:
        """Network calls of a step."""
        return 1 if self.sampler.guidance == 1.0 else 2


def _observed(pieces: Iterator[StreamPiece], starts: Sequence[int], keep: int, count: int) -> SampledStreams:
    """Read streams while they are made; seconds exclude the reading."""
    observer, kept, denoise, whole = StreamObserver(starts), [], 0.0, 0.0
    begin = time.perf_counter()
    for piece in pieces:
        whole += time.perf_counter() - begin
        denoise += piece.seconds
        observer.add(piece.frames)
        kept.append(piece.frames[:keep].clone())
        begin = time.perf_counter()
    return SampledStreams(observer.seen(), torch.cat(kept, dim=2), denoise / count, whole / count)


def _one_window(frames: Tensor) -> SeenStreams:
    observer = StreamObserver((0,))
    observer.add(frames)
    return observer.seen()


def _side_by_side(windows: Sequence[SeenStreams]) -> SeenStreams:
    """Windows of the same streams as one observation; positions and light are those of the windows, in a row."""
    joined = {
        name: torch.cat([getattr(window, name) for window in windows], dim=1)
        for name in ("positions", "ink", "saturation", "read", "features")
    }
    return SeenStreams(tuple(range(len(windows))), **joined)
