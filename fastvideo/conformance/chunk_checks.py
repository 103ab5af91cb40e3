"""Rules about causal calls: chunks on a past, and the same in one masked call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvideo.conformance.subject import COUNT, NotApplicable, Subject, check, require, require_close
from fastvideo.distillation.abilities import frame_decoder, of_frames
from fastvideo.distillation.chunks import Masked, Past, Reach, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import UserError

CAUSAL = "velocity(context=), commit()"
FRAMES = 5
REACHES = (Reach(2), Reach(1, window=2, sink=1))
"""All of the past in chunks of two (the first has three frames), and a window that moves on, beside a sink."""
LEVELS = (0.9, 0.3, 0.6, 0.8, 0.5)
TOLERANCE = 1e-4
"""Of the largest value: some CPUs round a convolution by its number of frames. A seam is a hundred times that."""


def _role(subject: Subject) -> Denoiser:
    if "chunks" not in subject.adapter.supports:
        raise NotApplicable("the family generates whole videos, not chunk by chunk")
    if of_frames(subject.adapter.conditioner).needs_frames:
        raise NotApplicable("the model goes on from frames of its own length of video")
    role = Denoiser(subject.adapter, subject.network)
    try:
        role.commit(Past(Reach(1)), _video(subject, 3)[:, :, :1], subject.condition)
    except UserError as refusal:
        raise NotApplicable(f"the model does not take chunks of one latent frame: {refusal}") from refusal
    return role


def _video(subject: Subject, seed: int) -> Tensor:
    channels, _, height, width = subject.adapter.codec.latent_shape
    return normal((COUNT, channels, FRAMES, height, width), seeded(seed)).to(subject.adapter.device)


def _times(subject: Subject, reach: Reach) -> list[Tensor]:
    """Times ``[B]`` of each chunk."""
    return [subject.times * (1 - 0.1 * index) for index in range(len(spans(FRAMES, reach.chunk)))]


def _per_frame(times: list[Tensor], reach: Reach) -> Tensor:
    counts = [end - start for start, end in spans(FRAMES, reach.chunk)]
    return torch.cat([t[:, None].expand(-1, count) for t, count in zip(times, counts, strict=True)], dim=1)


@torch.no_grad()
def _streamed(subject: Subject, role: Denoiser, reach: Reach, noisy: Tensor, clean: Tensor) -> Tensor:
    """Velocity of every chunk of ``noisy``, each on the clean ones before it."""
    past, found = Past(reach), []
    for (start, end), t in zip(spans(FRAMES, reach.chunk), _times(subject, reach), strict=True):
        found.append(role.velocity(noisy[:, :, start:end], t, subject.condition, context=past))
        past = role.commit(past, clean[:, :, start:end], subject.condition)
    return torch.cat(found, dim=2)


@check(CAUSAL)
def chunks_on_their_past_equal_one_call_of_teacher_forcing(subject: Subject) -> None:
    role, noisy, clean = _role(subject), _video(subject, 4), _video(subject, 5)
    for reach in REACHES:
        times = _per_frame(_times(subject, reach), reach)
        with torch.no_grad():
            masked = role.velocity(noisy, times, subject.condition, context=Masked(reach, clean))
        require_close(_streamed(subject, role, reach, noisy, clean), masked, f"chunks of {reach}", TOLERANCE)


def _noisy_stream(subject: Subject, role: Denoiser, reach: Reach, noisy: Tensor) -> list[Tensor]:
    """Velocity of every chunk of ``noisy``, each on the noisy ones before it, at times of their own."""
    past, found = Past(reach), list[Tensor]()
    for (start, end), level in zip(spans(FRAMES, reach.chunk), LEVELS, strict=False):
        chunk, t = noisy[:, :, start:end], torch.full_like(subject.times, level)
        with torch.no_grad():
            found.append(role.velocity(chunk, t, subject.condition, context=past))
        past = role.commit(past, chunk, subject.condition, level)
    return found


@check(CAUSAL)
def chunks_on_a_noisy_past_equal_one_call_of_diffusion_forcing(subject: Subject) -> None:
    role, noisy = _role(subject), _video(subject, 4)
    if "frame_times" not in subject.adapter.supports:
        raise NotApplicable("the family's network takes one time per sample")
    for reach in REACHES:
        found = _noisy_stream(subject, role, reach, noisy)
        times = _per_frame([torch.full_like(subject.times, level) for level in LEVELS[: len(found)]], reach)
        with torch.no_grad():
            masked = role.velocity(noisy, times, subject.condition, context=Masked(reach))
        require_close(torch.cat(found, dim=2), masked, f"noisy chunks of {reach}", TOLERANCE)


@check(CAUSAL)
def a_later_chunk_changes_nothing_before_it(subject: Subject) -> None:
    role, noisy, clean = _role(subject), _video(subject, 4), _video(subject, 5)
    start, reach = spans(FRAMES, 2)[-1][0], Reach(2)
    times = _per_frame(_times(subject, reach), reach)
    found = []
    for last in (noisy[:, :, start:], clean[:, :, start:]):
        changed = [torch.cat([video[:, :, :start], last], dim=2) for video in (noisy, clean)]
        with torch.no_grad():
            u = role.velocity(changed[0], times, subject.condition, context=Masked(reach, changed[1]))
        found.append(u[:, :, :start])
    require_close(found[1], found[0], "the chunks before a changed one")


@check(CAUSAL)
def a_chunk_reads_the_clean_chunks_before_it_and_not_its_own(subject: Subject) -> None:
    role, noisy, clean = _role(subject), _video(subject, 4), _video(subject, 5)
    start, reach = spans(FRAMES, 2)[-1][0], Reach(2)
    times = _per_frame(_times(subject, reach), reach)
    found = []
    for changed in (clean, _joined(clean, noisy, start), _joined(noisy, clean, start)):
        with torch.no_grad():
            u = role.velocity(noisy, times, subject.condition, context=Masked(reach, changed))
        found.append(u[:, :, start:])
    require_close(found[1], found[0], "a chunk beside other clean latents of its own")
    if not _frames_interact(subject):
        raise NotApplicable("no two frames of the model's videos depend on each other")
    require(not torch.allclose(found[2], found[0], rtol=1e-5, atol=1e-7), "another past gives the same velocity")


@torch.no_grad()
def _frames_interact(subject: Subject) -> bool:
    """True if another first frame changes the last one in a bidirectional call."""
    moved = subject.x_t.clone()
    moved[:, :, 0] += 1.0
    first, second = (subject.predict(x, subject.times)[:, :, -1] for x in (subject.x_t, moved))
    return moved.shape[2] > 1 and not torch.equal(first, second)


def _joined(first: Tensor, second: Tensor, start: int) -> Tensor:
    return torch.cat([first[:, :, :start], second[:, :, start:]], dim=2)


@check(CAUSAL)
def a_past_is_a_value(subject: Subject) -> None:
    """Later chunks leave it as it was, and it holds no graph."""
    role, noisy, clean = _role(subject), _video(subject, 4), _video(subject, 5)
    past = role.commit(Past(Reach(1)), clean[:, :, :1].requires_grad_(), subject.condition)
    held = [value for piece in past.pieces for layer in piece.layers for value in layer]
    require(not any(value.requires_grad for value in held), "the past carries gradient: detach what commit() keeps")
    require((past.length, past.frames) == (1, 1), f"one frame gave {past.length}, of which it keeps {past.frames}")
    arguments = noisy[:, :, 1:2], subject.times, subject.condition
    with torch.no_grad():
        before = role.velocity(*arguments, context=past)
        role.commit(role.commit(past, clean[:, :, 1:2], subject.condition), clean[:, :, 2:3], subject.condition)
        after = role.velocity(*arguments, context=replace(past))  # nothing derived from it before
    require(torch.equal(before, after), "a chunk on it gave another result after later chunks were committed")


@check(CAUSAL)
def a_past_serves_training_after_sampling(subject: Subject) -> None:
    role, noisy, clean = _role(subject), _video(subject, 4), _video(subject, 5)
    past = role.commit(Past(Reach(1)), clean[:, :, :1], subject.condition)
    x_t = noisy[:, :, 1:2].clone().requires_grad_()
    u = role.velocity(x_t, subject.times, subject.condition, context=past)
    (gradient,) = torch.autograd.grad(u.square().sum(), x_t)
    require(gradient.isfinite().all() and gradient.abs().sum() > 0, "no gradient reaches the chunk")


@check("codec.frame_decoder()")
@torch.no_grad()
def a_decoded_stream_has_no_seams(subject: Subject) -> None:
    if "chunks" not in subject.adapter.supports:
        raise NotApplicable("the family generates whole videos, not chunk by chunk")
    codec, latents = subject.adapter.codec, subject.noise(2, seed=5)
    try:
        decode, other = frame_decoder(codec), frame_decoder(codec)
    except UserError as refusal:
        raise NotApplicable(str(refusal)) from refusal
    pieces, forked = [], []
    for frame in torch.split(latents, 1, dim=2):
        fork = decode.fork()
        pieces.append(decode(frame))
        forked.append(fork(frame))
        other(-frame)
    whole = codec.decode(latents)
    for name, stream in (("a stream", pieces), ("its forks", forked)):
        require_close(torch.cat(stream, dim=2), whole, f"frames of {name} and of the whole video", TOLERANCE)
