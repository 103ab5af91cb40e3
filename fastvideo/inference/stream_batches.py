"""Streams of many prompts at once, frame by frame: one batch of :func:`sample` in a memory that does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor

from fastvideo.distillation.abilities import frame_decoder
from fastvideo.distillation.chunks import Contexts, spans
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, Stream
from fastvideo.distillation.types import Condition
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.locks import lock_of
from fastvideo.sampling_ranges import OnSwitch

Texts = tuple[Condition, Condition]
"""Condition of the prompts, and the negative one."""


@dataclass(frozen=True)
class StreamBatch:
    """Prompts that are streamed together.

    Attributes:
        seeds: of the noise of each prompt.
        called: called after each step's network calls.
    """

    model: LoadedModel
    sampler: SamplerSpec
    prompts: Sequence[str]
    seeds: Sequence[int]
    called: Callable[[], None] | None = None

    @property
    def noise(self) -> SampleNoise:
        """The noise streams at their beginning."""
        return SampleNoise(self.seeds, self.model.adapter.device)

    def under(self, texts: Texts, noise: SampleNoise) -> Stream:
        """The model's stream of these texts."""
        return Stream(self.model.denoiser, noise, self.sampler, *texts, called=self.called)

    def texts(self, prompts: Sequence[str]) -> Texts:
        """Condition of prompts, and the negative one."""
        conditioner = self.model.adapter.conditioner
        condition = conditioner.encode_prompts(prompts)
        if self.sampler.guidance == 1.0:
            return condition, condition
        return condition, conditioner.encode_prompts([conditioner.negative_prompt] * len(prompts))

    def start(self, noise: SampleNoise, frames: int) -> Tensor:
        """Noise of the next ``frames`` latent frames."""
        channels, _, *size = self.model.adapter.codec.latent_shape
        return noise.draw((channels, frames, *size))


@dataclass(frozen=True)
class Change:
    """Switch of all prompts of a batch.

    Attributes:
        prompts: new ones.
        latent: first latent frame under them, where a chunk begins.
        on_switch: treatment of the past.
    """

    prompts: Sequence[str]
    latent: int
    on_switch: OnSwitch


@dataclass(frozen=True)
class StreamPiece:
    """The next frames ``[B, 3, n, H, W]`` in ``[-1, 1]``, float32 on the CPU, and the seconds that denoising took."""

    frames: Tensor
    seconds: float = 0.0


@torch.no_grad()
def stream_frames(batch: StreamBatch, frames: int, change: Change | None = None) -> Iterator[StreamPiece]:
    """Stream ``frames`` video frames; without a change, those of ``sample()`` and a decoding of the whole.

    Raises:
        UserError: as :func:`latent_frames`, or for a family that cannot decode frame by frame.
    """
    codec, noise = batch.model.adapter.codec, batch.noise
    stream, decode = batch.under(batch.texts(batch.prompts), noise), frame_decoder(codec)
    past, last, latents, done = stream.opened, None, 0, 0
    for count in chain(stream.chunks(latent_frames(frames, codec.temporal)), repeat(_chunk(batch.sampler))):
        begin, start = time.perf_counter(), batch.start(noise, count)
        with lock_of(batch.model.denoiser.network):
            if change is not None and latents == change.latent and last is not None:
                past, stream = _switched(batch, change, stream, past, last, noise)
                decode, last = frame_decoder(codec) if change.on_switch == "cut" else decode, None
            past, last = stream.next_chunk(past, last, start)
        latents, seconds = latents + count, time.perf_counter() - begin
        for frame in torch.split(last, 1, dim=2):
            piece = decode(frame).float().cpu()[:, :, : frames - done]
            done += piece.shape[2]
            yield StreamPiece(piece, seconds)
            seconds = 0.0
            if done == frames:
                return


def _switched(
    batch: StreamBatch, change: Change, stream: Stream, past: Contexts, last: Tensor, noise: SampleNoise
) -> tuple[Contexts, Stream]:
    """The past of the next chunk, and the stream of the new prompts."""
    texts = batch.texts(change.prompts)
    after = batch.under(texts, noise)
    if change.on_switch == "cut":
        return after.opened, after
    return stream.switched(stream.commit(past, last), *texts, change.on_switch), after


def _chunk(sampler: SamplerSpec) -> int:
    return 1 if sampler.reach is None else sampler.reach.chunk


@torch.no_grad()
def continued(batch: StreamBatch, latents: Tensor, places: Sequence[int], frames: int) -> Iterator[tuple[int, Tensor]]:
    """Continuations of real videos, from several places on: what the model makes of a past that is not its own.

    Args:
        latents: real ones ``[B, C, F, H, W]``, committed chunk by chunk as the model's own would be.
        places: latent frames, not the first, at which a chunk begins.
        frames: video frames of a continuation.

    Yields:
        A place, and the last real video frame with the ``frames`` made behind it: ``[B, 3, 1 + frames, H, W]``.
    """
    noise, decode = batch.noise, frame_decoder(batch.model.adapter.codec)
    stream = batch.under(batch.texts(batch.prompts), noise)
    past, seen = stream.opened, None
    for start, end in spans(latents.shape[2], _chunk(batch.sampler)):
        if start in places and seen is not None:
            made = _continuation(batch, stream, past, noise, decode.fork(), frames)
            yield start, torch.cat([seen, made], dim=2)
        chunk = latents[:, :, start:end].to(batch.model.adapter.device)
        with lock_of(batch.model.denoiser.network):
            past = stream.commit(past, chunk)
        seen = decode(chunk).float().cpu()[:, :, -1:]


def _continuation(
    batch: StreamBatch,
    stream: Stream,
    past: Contexts,
    noise: SampleNoise,
    decode: Callable[[Tensor], Tensor],
    frames: int,
) -> Tensor:
    """Video frames ``[B, 3, frames, H, W]`` behind a past."""
    pieces: list[Tensor] = []
    last: Tensor | None = None
    while sum(piece.shape[2] for piece in pieces) < frames:
        start = batch.start(noise, _chunk(batch.sampler))
        with lock_of(batch.model.denoiser.network):
            past, last = stream.next_chunk(past, last, start)
        pieces.append(decode(last).float().cpu())
    return torch.cat(pieces, dim=2)[:, :, :frames]
