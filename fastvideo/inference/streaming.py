"""Streams: videos that a causal student makes chunk by chunk, without end, steered while they play.

.. code-block:: python

    streamer = Streamer.load("outputs/self_forcing/student", seed=0)
    with streamer.open("a green seven moving left") as stream:
        for frames in stream:                           # uint8 [n, H, W, 3]: a chunk
            show(frames)
            if stream.frames == 81:
                stream.prompt("a red seven moving up")  # from the next chunk on

A stream is the video that ``sample()`` makes of the same prompt and seed, frame for frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fastvideo.distillation.abilities import frame_decoder, of_frames
from fastvideo.distillation.chunks import Past, Reach, spans
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, prompt_seeds
from fastvideo.errors import UserError
from fastvideo.files import readable_size
from fastvideo.inference.first_frames import given_chunks
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.locks import lock_of
from fastvideo.inference.stream_stats import Clock
from fastvideo.inference.video_stream import Frames, Maker, Snapshot, Texts, VideoStream
from fastvideo.tiny.captions import parse_caption
from fastvideo.wording import counted

ANY_PROMPT = "a digit"
"""Words that every model knows, to load and to warm it up."""
NEARLY_NOISE = 0.99
"""Lowest first time of a sampler that starts from pure noise."""


class Streamer:
    """A causal model that opens streams, which do not disturb each other, in several threads either.

    Args:
        model: of a family with chunks and a decoder of frames.
        sampler: with a ``reach``.
        seed: determines with the prompt a stream's noise, as everywhere.
        negative_prompt: guidance leads away from it; ``None`` is the family's own.

    Raises:
        UserError: for a model or a sampler that cannot stream.
    """

    def __init__(
        self, model: LoadedModel, sampler: SamplerSpec, seed: int = 0, negative_prompt: str | None = None
    ) -> None:
        self.reach = checked_reach(model, sampler)
        self.model, self.sampler, self.seed = model, sampler, seed
        self._knows_captions_alone = model.is_embedded
        conditioner, codec = model.adapter.conditioner, model.adapter.codec
        self.negative_prompt = conditioner.negative_prompt if negative_prompt is None else negative_prompt
        channels, _, height, width = codec.latent_shape
        self._maker = Maker(
            model.denoiser, sampler, self._encode, partial(frame_decoder, codec), (channels, height, width)
        )

    @classmethod
    def load(
        cls,
        folder: str,
        seed: int = 0,
        *,
        window: int | None = None,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Streamer:
        """Load a model folder, a hub id or an embedded model, with its text encoder and decoder.

        Args:
            window: latent frames of the past that a chunk sees, instead of those of the training; warns.
            options: fields of the family's config that override the recipe's.

        Raises:
            UserError: as ``load_model``, and for a model that generates whole videos at once.
        """
        model = load_model(folder, options, device)
        streamer = cls(model, with_window(model.sampler(), window), seed)
        if note := window_note(model.sampler(), window):
            warnings.warn(note, stacklevel=2)
        streamer.open(ANY_PROMPT).close()
        return streamer

    def open(
        self, prompt: str, *, frames: int | None = None, seed: int | None = None, given: Frames | None = None
    ) -> VideoStream:
        """Begin a stream.

        Args:
            frames: video frames after which it ends, the given ones counted; without an end by default.
            seed: instead of the streamer's.
            given: uint8 ``[n, H, W, 3]``, an image or a clip that the stream goes on from: its first chunks are these
                frames as the decoder gives them back.

        Raises:
            UserError: for a prompt or given frames that the model cannot take, a number of frames that no video has, or
                a seed below 0.
        """
        clock = Clock(self.model.adapter.device)
        first = self.reach.chunk if frames is None else self.first_chunk(frames)
        chunks: tuple[Tensor, ...] = ()
        if given is not None:
            first, chunks = self.reach.chunk, given_chunks(self.model, given, self.reach.chunk, frames)
        noise = SampleNoise(prompt_seeds(self.seed if seed is None else seed, [prompt]), self.model.adapter.device)
        texts, pasts = self._encode(prompt), (Past(self.reach), Past(self.reach))
        moment = Snapshot(prompt, texts, pasts, noise, self._maker.new_decoder(), first, frames, given=chunks)
        return VideoStream(self._maker, moment, clock)

    def resume(self, snapshot: Snapshot) -> VideoStream:
        """Go on from a snapshot of a stream of this model, once more each time."""
        return VideoStream(self._maker, snapshot.fork(), Clock(self.model.adapter.device))

    def warm_up(self) -> None:
        """Make two chunks and forget them: libraries choose and compile kernels in the first."""
        with self.open(ANY_PROMPT) as stream:
            next(stream)
            next(stream)

    def describe(self, past_bytes: int | None = None) -> str:
        """One line for the terminal: chunks, reach, calls, and the memory of the past if it is given."""
        reach, twice = self.reach, self.sampler.guidance != 1.0
        seen = "the whole past" if reach.window is None else f"window {reach.window}"
        sink = f" + sink {reach.sink}" if reach.sink else ""
        calls = f"{counted(self.sampler.network_calls, 'call')} + {counted(1 + twice, 'commit')} per chunk"
        past = "" if past_bytes is None else f", past {readable_size(past_bytes)}"
        return f"stream: chunks of {reach.chunk}, {seen}{sink}, {calls}{past}"

    def check_prompt(self, prompt: str) -> None:
        """Check a prompt before it is used.

        Raises:
            UserError: if the model cannot take it.
        """
        self._encode(prompt)

    def video_frames(self, latents: int) -> int:
        """Frames of a video of so many latent frames."""
        return first_frame(latents, self.model.adapter.codec.temporal)

    def first_chunk(self, frames: int) -> int:
        """Latent frames of the first chunk of a video of ``frames`` frames.

        Raises:
            UserError: if no video has so many.
        """
        return spans(latent_frames(frames, self.model.adapter.codec.temporal), self.reach.chunk)[0][1]

    def _encode(self, prompt: str) -> Texts:
        """Condition of a prompt, and the negative one."""
        conditioner, guidance = self.model.adapter.conditioner, self.sampler.guidance
        if self._knows_captions_alone and prompt.strip():
            check_caption(prompt)
        with lock_of(conditioner):
            condition = conditioner.encode_prompts([prompt])
            negative = condition if guidance == 1.0 else conditioner.encode_prompts([self.negative_prompt])
        return condition, negative


def checked_reach(model: LoadedModel, sampler: SamplerSpec) -> Reach:
    """The reach of a sampler that can stream with this model.

    Raises:
        UserError: if it cannot.
    """
    source, family = model.source, model.adapter
    if sampler.reach is None or "chunks" not in family.supports:
        raise UserError(
            f"the model in {source} generates whole videos at once, and a stream needs one that was trained to go on "
            f"chunk by chunk (its recipe.json has `streaming`): sample this one with `fastvideo generate`"
        )
    if of_frames(family.conditioner).needs_frames:
        raise UserError(f"the model in {source} has given frames in its condition, where a stream has its text alone")
    if sampler.times[0] < NEARLY_NOISE:
        raise UserError(
            f"a stream's chunks start from pure noise, time 1, and the ladder from {sampler.times[0]:g}: give one that "
            f"starts at 1"
        )
    return sampler.reach


def check_caption(prompt: str) -> None:
    """Check that the tiny world knows every word of a prompt.

    Raises:
        UserError: with the words that it knows, or the form of a caption.
    """
    try:
        parse_caption(prompt)
    except ValueError as error:
        raise UserError(str(error)) from error


def with_window(sampler: SamplerSpec, window: int | None) -> SamplerSpec:
    """The sampler with another window; the same for ``None``.

    Raises:
        UserError: for a window that does not fit the chunks.
    """
    if window is None or sampler.reach is None:
        return sampler
    try:
        return replace(sampler, reach=replace(sampler.reach, window=window))
    except UserError as error:
        raise UserError(str(error).removeprefix("reach.")) from error


def window_note(sampler: SamplerSpec, window: int | None) -> str | None:
    """A warning about a window that the model was not trained with; ``None`` if it was."""
    if window is None or sampler.reach is None or window == sampler.reach.window:
        return None
    trained = "the whole past" if sampler.reach.window is None else f"a window of {sampler.reach.window}"
    return (
        f"warning: the student was trained with {trained}, and window {window} is another: expect flicker and drift. "
        f"To stream so, train so (method.reach.window)"
    )
