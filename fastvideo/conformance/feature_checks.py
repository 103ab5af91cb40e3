"""Rules about features: tokens of the network's blocks, for discriminators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.conformance.subject import COUNT, NotApplicable, Subject, check, require, require_close
from fastvideo.distillation.features import Featured, widths_of
from fastvideo.distillation.types import Condition

FEATURES = "features(), blocks, feature_widths"


def _family(subject: Subject) -> Featured:
    if not isinstance(subject.adapter, Featured):
        raise NotApplicable("the family has no features, so methods with a discriminator refuse it")
    return subject.adapter


def _taps(subject: Subject) -> tuple[int, ...]:
    if "features" not in subject.adapter.supports:
        raise NotApplicable("the model has no features, so methods with a discriminator refuse it")
    return tuple(range(len(widths_of(subject.adapter))))


def _features(subject: Subject, taps: tuple[int, ...], x_t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    return _family(subject).features(subject.network, x_t, subject.times, condition, taps)[1]


@check(FEATURES)
def features_are_float32_tokens_of_the_declared_widths(subject: Subject) -> None:
    taps = _taps(subject)
    found = _features(subject, taps, subject.x_t, subject.condition)
    for tap, tokens, width in zip(taps, found, widths_of(subject.adapter), strict=True):
        shape = tuple(tokens.shape)
        require(len(shape) == 3 and shape[::2] == (COUNT, width), f"tap {tap}: {shape}, declared [B, L, {width}]")
        require(tokens.dtype == torch.float32, f"tap {tap}: {tokens.dtype}; cast to float32 before it is returned")
        frames = subject.adapter.codec.latent_shape[1]
        if "frame_times" in subject.adapter.supports:
            require(shape[1] % frames == 0, f"tap {tap}: {shape[1]} tokens do not divide into {frames} latent frames")


@check(FEATURES)
def features_are_those_of_the_whole_call(subject: Subject) -> None:
    taps = _taps(subject)
    arguments = subject.network, subject.x_t, subject.times, subject.condition
    u, whole = _family(subject).features(*arguments, taps, whole=True)
    assert u is not None
    require_close(u, subject.predict(subject.x_t, subject.times), "the velocity with and without features")
    for tap in taps:
        _, (early,) = _family(subject).features(*arguments, (tap,))
        require_close(early, whole[tap], f"tap {tap} of a call that ends there, and of a whole call")
    again = subject.predict(subject.x_t, subject.times)
    require_close(again, u, "the velocity before and after features were read")


@check(FEATURES)
def features_carry_gradient_and_samples_stay_apart(subject: Subject) -> None:
    taps = _taps(subject)
    x_t = subject.x_t.clone().requires_grad_()
    for tap, tokens in zip(taps, _features(subject, taps, x_t, subject.condition), strict=True):
        (gradient,) = torch.autograd.grad(tokens[1].square().sum(), x_t, retain_graph=True)
        require(gradient[1].abs().sum() > 0, f"tap {tap}: no gradient reaches the input")
        require(torch.count_nonzero(gradient[[0, 2]]) == 0, f"tap {tap}: it depends on the other samples")


@check(FEATURES)
def tokens_come_frame_by_frame(subject: Subject) -> None:
    taps, frames = _taps(subject), subject.adapter.codec.latent_shape[1]
    if "frame_times" not in subject.adapter.supports or frames == 1:
        raise NotApplicable("no frames can be given, or there is one: the order of tokens does not matter")
    moved = subject.x_t.clone()
    moved[:, :, -1] += 1.0
    before, after = (_features(subject, taps, x, subject.condition)[0] for x in (subject.x_t, moved))
    change = (after - before).square().sum((0, 2)).view(frames, -1).sum(1)
    require(change[-1] >= change.max(), "another last frame changes the tokens of another frame most")
