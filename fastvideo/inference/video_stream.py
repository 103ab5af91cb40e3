"""A video that is being made chunk by chunk: an iterator whose prompt can change and whose state is a value."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastvideo.data.video_io import to_frames
from fastvideo.distillation.abilities import FrameDecoder
from fastvideo.distillation.chunks import Contexts, Past
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, Stream
from fastvideo.distillation.types import Condition
from fastvideo.errors import UserError
from fastvideo.inference.locks import lock_of
from fastvideo.inference.stream_stats import Clock, StreamStats
from fastvideo.sampling_ranges import ON_SWITCH, OnSwitch
from fastvideo.wording import did_you_mean

Frames = npt.NDArray[np.uint8]
Texts = tuple[Condition, Condition]
"""Condition of a prompt, and the negative one."""


@dataclass(frozen=True)
class Switch:
    """Change of the prompt.

    Attributes:
        texts: condition of the new prompt, and the negative one.
        frame: number of the first video frame under it, from 0; ``None`` before there is one.
    """

    prompt: str
    on_switch: OnSwitch
    texts: Texts
    frame: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """A stream at one moment, from which it can go on any number of times.

    Attributes:
        prompt: in force.
        texts: its condition, and the negative one.
        pasts: of the finished chunks but the last.
        noise: random stream at its position.
        decode: decoder with its state.
        chunk: latent frames of the next chunk that is made.
        end: video frames in all; ``None`` without an end.
        frames: video frames so far.
        last: latest chunk, in no past yet.
        switch: latest one that took effect.
        asked: one that waits for the next chunk.
        given: chunks ``[1, C, c, H, W]`` that come before the first that is made.
    """

    prompt: str
    texts: Texts
    pasts: Contexts
    noise: SampleNoise
    decode: FrameDecoder
    chunk: int
    end: int | None = None
    frames: int = 0
    last: Tensor | None = None
    switch: Switch | None = None
    asked: Switch | None = None
    given: tuple[Tensor, ...] = ()

    def fork(self) -> Snapshot:
        """The same moment with a random stream and a decoder of its own, and pasts that share their pieces alone."""
        return replace(self, pasts=_bare(self.pasts), noise=self.noise.fork(), decode=self.decode.fork())

    @property
    def past_bytes(self) -> int:
        """Memory of what the network remembers; without guidance both pasts are one."""
        pasts = {id(past): past for past in self.pasts if isinstance(past, Past)}
        return sum(past.bytes for past in pasts.values())


@dataclass(frozen=True)
class Maker:
    """All that the streams of one model share.

    Attributes:
        denoiser, sampler: network, and a sampler with a ``reach``.
        encode: condition of a prompt, and the negative one.
        new_decoder: a decoder at the beginning of a video.
        latent_size: ``(C, H, W)``.
    """

    denoiser: Denoiser
    sampler: SamplerSpec
    encode: Callable[[str], Texts]
    new_decoder: Callable[[], FrameDecoder]
    latent_size: tuple[int, int, int]

    @property
    def chunk(self) -> int:
        """Latent frames of every chunk but the first."""
        assert self.sampler.reach is not None
        return self.sampler.reach.chunk

    def latents(self, moment: Snapshot, clock: Clock) -> tuple[Snapshot, Tensor]:
        """The next chunk ``[1, C, c, H, W]``, and the moment with all before it in the past."""
        channels, *size = self.latent_size
        with lock_of(self.denoiser.network):
            if moment.given:
                moment = self.settled(moment)
            if moment.given:  # a cut leaves none
                return replace(moment, pasts=_bare(moment.pasts), given=moment.given[1:]), moment.given[0]
            start = moment.noise.draw((channels, moment.chunk, *size))
            with clock.part("commit"):
                moment = self.settled(moment)
            with clock.part("denoise"):
                latents = self._stream(moment).next_chunk(moment.pasts, None, start)[1]
                return replace(moment, pasts=_bare(moment.pasts)), latents

    def settled(self, moment: Snapshot) -> Snapshot:
        """The moment with its last chunk in the past, and with the prompt that was asked for."""
        if moment.asked is not None:
            return self._switched(moment, replace(moment.asked, frame=moment.frames))
        if moment.last is None:
            return moment
        return replace(moment, pasts=self._stream(moment).commit(moment.pasts, moment.last), last=None)

    def _switched(self, moment: Snapshot, switch: Switch) -> Snapshot:
        now = replace(moment, prompt=switch.prompt, texts=switch.texts, switch=switch, asked=None, last=None)
        if moment.last is None:
            return now
        if switch.on_switch == "cut":
            return replace(now, pasts=self._stream(now).opened, decode=self.new_decoder(), given=())
        stream = self._stream(moment)
        return replace(
            now, pasts=stream.switched(stream.commit(moment.pasts, moment.last), *switch.texts, switch.on_switch)
        )

    def _stream(self, moment: Snapshot) -> Stream:
        return Stream(self.denoiser, moment.noise, self.sampler, *moment.texts)


class VideoStream:
    """Iterator of the frames of each chunk, uint8 ``[n, H, W, 3]``; as a context it frees its memory at the end.

    One thread iterates; others may call everything else meanwhile.
    """

    def __init__(self, maker: Maker, moment: Snapshot, clock: Clock) -> None:
        self._maker, self._clock = maker, clock
        self._moment, self._closed = replace(moment, asked=None), False
        self._asked: deque[Switch] = deque([moment.asked] if moment.asked else [], maxlen=1)
        self._working = threading.Lock()

    @property
    def frames(self) -> int:
        """Video frames so far."""
        return self._moment.frames

    @property
    def prompt_in_force(self) -> str:
        """Prompt of the latest chunk."""
        return self._moment.prompt

    @property
    def switch(self) -> Switch | None:
        """Latest change of the prompt that took effect."""
        return self._moment.switch

    @property
    def stats(self) -> StreamStats:
        """Figures now."""
        moment = self._moment
        return self._clock.read(moment.frames, moment.past_bytes, moment.decode.bytes)

    def prompt(self, text: str, on_switch: OnSwitch = ON_SWITCH) -> None:
        """Set the prompt from the next chunk on; of several before it, the last one wins.

        Args:
            on_switch: what stays of the past: ``flush`` keeps the sink and the last chunk, ``recache`` reads all of it
                again under the new prompt, ``keep`` leaves it, ``cut`` begins a new video.

        Raises:
            UserError: for a prompt that the model cannot take, or an unknown policy; the stream goes on as before.
        """
        self._asked.append(Switch(text, _checked(on_switch), self._maker.encode(text)))

    def snapshot(self) -> Snapshot:
        """The stream now; during a chunk, after it.

        Raises:
            UserError: for a closed stream, whose past is gone.
        """
        with self._working:
            if self._closed:
                raise UserError("a closed stream has no past to go on from: take the snapshot before it is closed")
            return replace(self._moment.fork(), asked=self._asked[-1] if self._asked else None)

    def close(self) -> None:
        """End the stream and free its memory; there are no more frames."""
        with self._working:
            self._closed = True
            self._moment = replace(self._moment, pasts=(None, None), decode=self._maker.new_decoder(), last=None)

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> Frames:
        with self._working:
            if self._closed or self._moment.frames == self._moment.end:
                raise StopIteration
            frames = self._advance()
            while not len(frames):  # a decoder may wait for another chunk
                frames = self._advance()
            return frames

    def _advance(self) -> Frames:
        asked = self._asked.popleft() if self._asked else None
        given = self._moment.given[:1]
        moment, latents = self._maker.latents(replace(self._moment, asked=asked), self._clock)
        with self._clock.part("decode"):
            frames = to_frames(moment.decode(latents)[0])
        if moment.end is not None:
            frames = frames[: moment.end - moment.frames]
        self._clock.finish(len(frames), made=not given or latents is not given[0])
        total = moment.frames + len(frames)
        self._moment = replace(moment, last=latents, frames=total, chunk=self._maker.chunk)
        return frames

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bare(pasts: Contexts) -> Contexts:
    """Pasts without what their calls have derived, such as rotated keys; one past for both predictions stays one."""
    found = {id(past): replace(past) for past in pasts if isinstance(past, Past)}
    conditional, unconditional = (found[id(past)] for past in pasts)
    return conditional, unconditional


def _checked(policy: OnSwitch) -> OnSwitch:
    """The policy, which callers of Python may have misspelt."""
    known = get_args(OnSwitch)
    if policy not in known:
        raise UserError(f"on_switch {policy!r}: one of {', '.join(known)} is expected{did_you_mean(policy, known)}")
    return policy
