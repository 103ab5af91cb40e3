"""Streaming tuning: Self-Forcing on long streams that go on from step to step, with switches of the prompt (LongLive,
arXiv 2509.22622).

A stream survives its step: the next one continues it from its past by some frames, and teacher and critic score the
window that ends with them. Its earlier frames are context there, without gradient. So the student trains on pasts as
long as those it will meet, at the cost of a short rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.causal_rollout import Continuation, roll
from fastvideo.distillation.chunks import Past, frames_of, spans
from fastvideo.distillation.methods.distribution_matching.running_stream import RunningStream, StreamKeeper
from fastvideo.distillation.methods.distribution_matching.self_forcing import SelfForcingMethod
from fastvideo.distillation.methods.distribution_matching.streaming_tuning_config import StreamingTuningConfig
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Condition, UserError

LEAD = 12
"""Latent frames before a window from which the image of its first one is decoded, if the stream has so many. A causal
decoder that begins within a stream errs there; 12 latent frames later it is at 90 dB of the one that saw the whole
(``test_scored_windows.py``)."""


class StreamingTuningMethod(SelfForcingMethod):
    """Causal student, frozen bidirectional teacher, bidirectional critic."""

    Config = StreamingTuningConfig
    config: StreamingTuningConfig
    summary = "streaming tuning: Self-Forcing on long streams, with prompt switches (LongLive, arXiv 2509.22622)"

    def __init__(self, config: StreamingTuningConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.keeper = StreamKeeper(rng.device)

    @property
    def own_parts(self) -> Mapping[str, Any]:
        return {"stream": self.keeper}

    def sample(self, batch: Batch) -> tuple[Tensor, Batch]:
        """The window that ends with a stream's next frames, and its batch, with the prompt in force for them."""
        before = self.next_stream(batch)
        stream, new = self.extended(before, self.new_frames(before, batch))
        count = self.window(batch, stream.length)
        frames = torch.cat([before.latents, new], dim=2)[:, :, -(LEAD + count) :]
        past = replace(stream.past, texts=None, shared=None)  # the weights change before the next step
        self.keeper.stream = replace(stream, latents=frames.detach(), past=past)
        window, up_to_it = frames[:, :, -count:], frames[:, :, : frames.shape[2] - count + 1]
        start = stream.length - count
        condition = frames_of(stream.condition, start, stream.length)
        scoring = Batch(tuple(window.shape), condition, Condition(batch.negative.tensors, condition.given))
        return self.scored(window, up_to_it, scoring, start, count - new.shape[2])

    def next_stream(self, batch: Batch) -> RunningStream:
        """The running stream with its prompt in force, or a new one of this batch, if that has come to its end."""
        stream = self.keeper.stream
        if stream is None or not stream.fits(batch) or self.ended(stream, batch):
            return self.begun(batch)
        if stream.switch is None or not stream.switches_now:
            return stream
        _, past = self.continuation(stream).switched(stream.past, stream.switch, self.config.on_switch)
        return replace(stream, past=past, condition=stream.switch, switch=None)

    def ended(self, stream: RunningStream, batch: Batch) -> bool:
        """True if the next frames do not fit any more, and no switch is ahead: up to it and behind it fewer will do."""
        return stream.switch is None and stream.length + self.least_new(batch) > stream.most

    def begun(self, batch: Batch) -> RunningStream:
        """A stream without a frame.

        Raises:
            UserError: if there are no prompts to switch to.
        """
        most, switch_at = self.length(batch), self.switch_frame(batch)
        switches = switch_at is not None and switch_at + self.config.reach.chunk <= most
        if switches and batch.switch is None:
            raise UserError("method.switch_frames: the data has no prompts to switch to; give data.switch_prompts")
        switch = batch.switch if switches else None
        nothing = torch.empty((*batch.shape[:2], 0, *batch.shape[3:]), device=self.rng.device)
        return RunningStream(Past(self.config.reach), nothing, batch.condition, switch, switch_at or 0, 0, most)

    def switch_frame(self, batch: Batch) -> int | None:
        """First frame of the chunk where the next stream switches, equal on all ranks."""
        starts = self.config.switch_starts(batch.shape[2])
        return starts[self.rng.shared_index(len(starts))] if starts else None

    def least_new(self, batch: Batch) -> int:
        """Fewest new frames of a step, whole chunks."""
        chunk, window = self.config.reach.chunk, self.window(batch, batch.shape[2])
        least = self.config.min_new_frames or max(chunk, window - chunk)
        return chunk * max(1, min(-(-least // chunk), window // chunk))

    def new_frames(self, stream: RunningStream, batch: Batch) -> int:
        """New frames of this step, equal on all ranks: a window at first, then a drawn number of chunks."""
        chunk, window = self.config.reach.chunk, self.window(batch, batch.shape[2])
        least = self.least_new(batch) // chunk
        count = window if not stream.length else chunk * (least + self.rng.shared_index(window // chunk - least + 1))
        left = stream.most - stream.length
        until = stream.switch_at - stream.length if stream.switch is not None else left
        return min(count, until, left if not stream.length else left // chunk * chunk)

    def extended(self, stream: RunningStream, count: int) -> tuple[RunningStream, Tensor]:
        """The stream after ``count`` more frames, and those, with the gradient of one call per chunk."""
        runs = [end - start for start, end in spans(count, self.config.reach.chunk)]
        plan = zip(self.exits(len(runs), opening=not stream.past.length), [True] * len(runs), strict=True)
        shape, solve = stream.latents.shape, self.solver(plan)
        noise = self.rng.normal((*shape[:2], count, *shape[3:]))
        student = self.continuation(stream)
        begun = replace(stream.past, shared={})
        pasts, chunks = zip(*roll(student, begun, torch.split(noise, runs, dim=2), solve), strict=True)
        past = student.commit(pasts[-1], chunks[-1])
        return replace(stream, past=past, length=stream.length + count), torch.cat(chunks, dim=2)

    def continuation(self, stream: RunningStream) -> Continuation:
        """The student with the prompt in force."""
        return Continuation(self.student, stream.condition, self.config.context_time, self.rng.normal_like)
