"""Checks of roles that score single frames, and the bridge to their space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastvideo.distillation.abilities import of_folder, of_frames
from fastvideo.distillation.adapters.base import Codec, DistillAdapter
from fastvideo.distillation.bridge import AGREEMENT, latent_difference
from fastvideo.distillation.frame_bridge import CodecFrames, FrameBridge, FrameUse
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import UserError

Adapter = DistillAdapter[Any]
STILLS, SIDE, COARSE = 8, 64, 8
"""Stills of the probe, their side in pixels, and that of the coarse colours that they are made of."""
STRETCH = 1.1
"""Ratio of two shapes up to which a frame counts as not squeezed."""


def frame_bridge(
    use: FrameUse, main: Adapter, by_role: Mapping[str, Adapter], *, recompute: bool = False
) -> tuple[FrameBridge, str]:
    """The bridge from the student's videos to the frames' space, and a line about it.

    Args:
        recompute: of :class:`CodecFrames`.

    Raises:
        UserError: with the field, if roles, sizes, frames or times do not fit.
    """
    teacher = by_role[use.roles[0]]
    _check_stills(use, by_role)
    _check_videos(use, main)
    noisiest = of_folder(teacher.folder).noisiest
    if use.times[1] > noisiest:
        raise UserError(
            f"method.frame_time_range: ends at {use.times[1]}, and the noisiest level that {use.roles[0]} was trained "
            f"on is {noisiest:.4f}"
        )
    shared, difference = _shares_first_frame(use, main.codec, teacher.codec)
    if not shared or use.count > 1:
        _check_sizes(use, main.codec, teacher)
    bridge = CodecFrames(main.codec, teacher.codec, shared=shared, noisiest=noisiest, recompute=recompute)
    return bridge, _told(use, shared, difference)


def _told(use: FrameUse, shared: bool, difference: float | None) -> str:
    probe = "" if difference is None else f" ({STILLS} stills differ by {difference:.2%} rms)"
    if not shared:
        return f"frames reach {use.roles[0]} decoded and encoded again{probe}"
    rest = "" if use.count == 1 else "; the others are decoded and encoded again"
    return f"the first frame reaches {use.roles[0]} as it is: its latent space is the student's{probe}{rest}"


def _check_stills(use: FrameUse, by_role: Mapping[str, Adapter]) -> None:
    """The roles make stills, in one latent space and of one size, and read one kind of text."""
    first, *others = use.roles
    codec = by_role[first].codec
    if codec.parts is not None:
        raise UserError(
            f"roles.{first}.model: its samples are {codec.parts}, and single frames are scored here: give a family of "
            f"images, such as {{family: sdxl, path: ...}}"
        )
    if (frames := codec.latent_shape[1]) != 1:
        raise UserError(
            f"roles.{first}.model: it makes videos of {frames} latent frames, and scores single frames here: give a "
            f"family of images, such as {{family: sdxl, path: ...}}, or num_frames: 1"
        )
    for role in others:
        own = by_role[role]
        same = own.codec.latent_key == codec.latent_key and own.codec.latent_shape == codec.latent_shape
        if not same or type(own) is not type(by_role[first]):
            raise UserError(
                f"roles.{role}.model: {first} and {role} score the same frames, so they need one family, latent space "
                f"and size: give {role} the model section of {first}"
            )


def _check_videos(use: FrameUse, main: Adapter) -> None:
    """The student generates every frame, and enough of them."""
    if of_frames(main.conditioner).needs_frames:
        raise UserError(
            "model: it goes on from given frames, which hold no information for a frame teacher: methods without one "
            "train it"
        )
    available = main.codec.latent_shape[1]
    if use.count > available:
        raise UserError(
            f"method.frames_per_video: {use.count}, and a video has {available} latent frames, of which one frame each "
            f"is taken"
        )


def _shares_first_frame(use: FrameUse, source: Codec, target: Codec) -> tuple[bool, float | None]:
    """Check if the first latent frame of a video is a still of the other space; and the probe's difference.

    Raises:
        UserError: if the config says that it is, and it is not, or asks for frames that never are.
    """
    if use.space == "decoded":
        return False, None
    fits = (source.latent_shape[0], *source.latent_shape[2:]) == (target.latent_shape[0], *target.latent_shape[2:])
    equal = source.latent_key == target.latent_key
    difference = 0.0 if equal else still_difference(source, target) if fits else None
    shared = fits and difference is not None and difference <= AGREEMENT
    if use.space == "identity":
        _check_identity(use, source, target, fits, difference)
    return shared or (use.space == "identity"), None if equal else difference


def _check_identity(use: FrameUse, source: Codec, target: Codec, fits: bool, difference: float | None) -> None:
    role, one = use.roles[0], source.latent_shape[0] == target.latent_shape[0]
    if not fits:
        raise UserError(
            f"method.frame_space: identity, and a latent frame of the student is {_shape(source)}, a still of {role} "
            f"{_shape(target)} (C, H, W): {'give both one height and width, or' if one else 'set'} frame_space: decoded"
        )
    if difference is not None and difference > AGREEMENT:
        raise UserError(
            f"method.frame_space: identity, and the latent spaces differ: the student's latent_key is "
            f"{source.latent_key}, that of {role} {target.latent_key}, and {STILLS} stills differ by {difference:.1%} "
            f"rms (up to {AGREEMENT:.0%} is taken for one space); set frame_space: decoded"
        )
    if use.count > 1 or not use.first:
        raise UserError(
            "method.frames_per_video: frame_space: identity scores the first frame alone, since other latent frames "
            "hold several frames each and are no stills: set frames_per_video: 1 and first_frame: true, or "
            "frame_space: auto, which decodes the others"
        )


def _shape(codec: Codec) -> tuple[int, ...]:
    return codec.latent_shape[0], *codec.latent_shape[2:]


def _check_sizes(use: FrameUse, source: Codec, teacher: Adapter) -> None:
    """Frames keep their shape, and their teacher sees a size that it was trained on."""
    if use.resize:
        return
    own, other = source.frame_size, teacher.codec.frame_size
    shape, side = (own[1] / own[0]) / (other[1] / other[0]), of_folder(teacher.folder).trained_side
    key, sizes = f"roles.{use.roles[0]}.model", f"{other[0]} x {other[1]} (height x width)"
    if max(shape, 1 / shape) > STRETCH:
        raise UserError(
            f"{key}: its pictures are {sizes}, and the frames of the student's videos, {own[0]} x {own[1]}, would be "
            f"squeezed: give it a height and width of that shape, or set method.allow_resize: true"
        )
    if side is not None and math.prod(other) > STRETCH * side**2:
        raise UserError(
            f"{key}: its pictures are {sizes}, and it was trained on up to {side} x {side} pixels: give it a smaller "
            f"height and width, or set method.allow_resize: true"
        )


def still_difference(source: Codec, target: Codec) -> float:
    """:func:`~fastvideo.distillation.bridge.latent_difference` on stills."""
    return latent_difference(source, target, probe_stills())


def probe_stills() -> Tensor:
    """Stills ``[8, 3, 1, 64, 64]`` of soft and of hard-edged colours, the same every time."""
    coarse = normal((STILLS, 3, COARSE, COARSE), seeded(0)).clamp(-2, 2) / 2
    soft = functional.interpolate(coarse[: STILLS // 2], (SIDE, SIDE), mode="bilinear")
    hard = functional.interpolate(coarse[STILLS // 2 :], (SIDE, SIDE), mode="nearest")
    return torch.cat([soft, hard])[:, :, None]
