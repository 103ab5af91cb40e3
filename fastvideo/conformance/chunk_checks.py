"""Rules about causal calls: chunks on a past, and the decoder of a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.conformance.subject import COUNT, NotApplicable, Subject, check, require, require_close
from fastvideo.distillation.chunks import Masked, Past, Reach, frames_of, per_frame, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.types import Condition, UserError

CHUNKS = "velocity(context=...), commit()"


def _reach(subject: Subject) -> Reach:
    """Chunks of as few frames as the network takes."""
    if "chunks" not in subject.adapter.supports:
        raise NotApplicable("the family generates whole videos, so methods of streams refuse it")
    frames, refusal = subject.adapter.codec.latent_shape[1], ""
    for chunk in range(1, frames // 2 + 1):
        try:
            _denoiser(subject).commit(Past(Reach(chunk)), subject.x_t[:, :, :chunk], _condition(subject, 0, chunk))
        except UserError as error:
            refusal = str(error)
        else:
            return Reach(chunk)
    raise NotApplicable(refusal or "the latents have one frame; give the model a longer video to check this")


def _denoiser(subject: Subject) -> Denoiser:
    return Denoiser(subject.adapter, subject.network)


def _condition(subject: Subject, start: int, end: int) -> Condition:
    return frames_of(subject.condition, start, end)


def _times(subject: Subject, reach: Reach) -> Tensor:
    """A time per chunk, ``[B, F]``."""
    frames = subject.x_t.shape[2]
    count = len(spans(frames, reach.chunk))
    times = torch.linspace(0.3, 0.9, count, device=subject.adapter.device).expand(COUNT, count)
    return per_frame(times, frames, reach.chunk)


@torch.no_grad()
def _forced(subject: Subject, reach: Reach, x_t: Tensor, clean: Tensor) -> Tensor:
    context = Masked(reach, clean)
    return _denoiser(subject).velocity(x_t, _times(subject, reach), subject.condition, context=context)


@check(CHUNKS)
def a_chunk_sees_the_clean_past_and_no_future(subject: Subject) -> None:
    reach = _reach(subject)
    x_t, clean = subject.x_t, subject.noise(COUNT, seed=5)
    start = spans(x_t.shape[2], reach.chunk)[-1][0]
    base = _forced(subject, reach, x_t, clean)
    late, early = clean.clone(), clean.clone()
    late[:, :, start:] += 1.0
    early[:, :, :start] += 1.0
    own = _forced(subject, reach, x_t, late)
    require_close(own, base, "a chunk with and without its own clean latents beside it")
    moved = x_t.clone()
    moved[:, :, start:] += 1.0
    after = _forced(subject, reach, moved, clean)
    require_close(after[:, :, :start], base[:, :, :start], "chunks before one that changes")
    past = _forced(subject, reach, x_t, early)
    same = torch.allclose(past[:, :, start:], base[:, :, start:], rtol=1e-5, atol=1e-7)
    require(not same, "another past gives the same velocity")


@check(CHUNKS)
@torch.no_grad()
def chunks_one_by_one_are_those_of_one_call(subject: Subject) -> None:
    reach, role = _reach(subject), _denoiser(subject)
    x_t, clean, times = subject.x_t, subject.noise(COUNT, seed=5), _times(subject, reach)
    past, found = Past(reach), []
    for start, end in spans(x_t.shape[2], reach.chunk):
        own = _condition(subject, start, end)
        found.append(role.velocity(x_t[:, :, start:end], times[:, start], own, context=past))
        past = role.commit(past, clean[:, :, start:end], own)
    require_close(torch.cat(found, dim=2), _forced(subject, reach, x_t, clean), "chunks in turn and in one call")


@check(CHUNKS)
@torch.no_grad()
def a_past_is_a_value(subject: Subject) -> None:
    reach, role = _reach(subject), _denoiser(subject)
    (_, first), (start, end), *_ = spans(subject.x_t.shape[2], reach.chunk)
    own, x_t = _condition(subject, start, end), subject.x_t[:, :, start:end]
    past = role.commit(Past(reach), subject.noise(COUNT, seed=5)[:, :, :first], _condition(subject, 0, first))
    before = role.velocity(x_t, subject.times, own, context=past)
    role.commit(past, x_t, own)
    again = role.velocity(x_t, subject.times, own, context=past)
    require(torch.equal(before, again), "a commit changed the past that it continues")


@check("codec.frame_decoder()")
@torch.no_grad()
def a_decoded_stream_has_no_seams(subject: Subject) -> None:
    if "chunks" not in subject.adapter.supports:
        raise NotApplicable("the family generates whole videos, so methods of streams refuse it")
    codec, latents = subject.adapter.codec, subject.noise(2, seed=5)
    decode, other = codec.frame_decoder(), codec.frame_decoder()
    pieces = []
    for frame in torch.split(latents, 1, dim=2):
        pieces.append(decode(frame))
        other(-frame)
    require_close(torch.cat(pieces, dim=2), codec.decode(latents), "frames of a stream and of the whole video")
