"""``FrameBridge``: from a student's videos to single frames of them in the latent space of an image family.

A frame crosses in one of two ways. The first one may be a still of the other space already: a causal video VAE encodes
it alone, and families of stills that keep such a VAE (Qwen-Image keeps Wan's) share that part of the space. Every other
frame is decoded with its complete past, resized and encoded; its gradient ends in its own latent frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastvideo.distillation.frames import latent_frame

FrameSpace = Literal["auto", "identity", "decoded"]
"""Ways of the frames: the first as it is where the spaces are shared and the others decoded, the first alone and as it
is, or all decoded."""
Picks = Sequence[Sequence[int]]
"""Numbers of video frames of each sample, as many for each."""


@dataclass(frozen=True)
class FrameUse:
    """Single frames that a method scores.

    Attributes:
        roles: roles that score them; all live in one space of stills.
        space: way of the frames to that space.
        count: frames of each video.
        first: the first frame is always one of them.
        times: noise levels at which they are scored.
        resize: frames may be enlarged, and change their shape.
    """

    roles: tuple[str, ...]
    space: FrameSpace
    count: int
    first: bool
    times: tuple[float, float]
    resize: bool


@runtime_checkable
class ScoresFrames(Protocol):
    """Method with roles that score single frames of the student's videos."""

    @classmethod
    def frames_of(cls, config: Any) -> FrameUse:
        """Those roles, and how they score."""
        ...


@dataclass(frozen=True)
class Stills:
    """Frames in the space of an image family.

    Attributes:
        latents: ``[B * n, C, 1, h, w]``, the frames of each sample in a row.
        figures: scalars about the pixels that were decoded, if any, without gradient.
    """

    latents: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class FrameBridge:
    """The bridge where every latent frame is a still of the other space."""

    temporal = 1
    """Video frames per latent frame, but for the first."""
    noisiest = 1.0
    """Latest time that the networks of the other space know."""

    def stills(self, x0: Tensor, picks: Picks) -> Stills:
        """The picked frames of clean latents ``[B, C, F, H, W]``."""
        return Stills(torch.stack([x0[row, :, pick : pick + 1] for row, own in enumerate(picks) for pick in own]))

    def __call__(self, x0: Tensor, picks: Picks | None = None) -> Tensor:
        """Latents of :meth:`stills`; of the first frame of each sample without ``picks``."""
        return self.stills(x0, [[0]] * len(x0) if picks is None else picks).latents


class VideoCodec(Protocol):
    """The part of a video family's codec that a bridge of frames needs."""

    @property
    def temporal(self) -> int: ...
    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor: ...


@runtime_checkable
class FrameCodec(Protocol):
    """Codec that decodes single frames."""

    def decode_frames(self, latents: Tensor, picks: Picks, *, recompute: bool = False) -> Tensor:
        """:func:`decode_frames`, at less cost."""
        ...


class StillCodec(Protocol):
    """The part of an image family's codec that a bridge of frames needs."""

    @property
    def frame_size(self) -> tuple[int, int]: ...
    def encode(self, videos: Tensor, *, gradient: bool = False) -> Tensor: ...


class CodecFrames(FrameBridge):
    """Decodes frames with one codec and encodes them with the other, both with gradient to latents alone.

    Args:
        source, target: codecs of the videos and of the stills.
        shared: the first latent frame is a still of the other space, and crosses as it is.
        noisiest: latest time that the networks of the other space know.
        recompute: decode again in backward instead of keeping what decoding computes.
    """

    def __init__(
        self,
        source: VideoCodec,
        target: StillCodec,
        *,
        shared: bool = False,
        noisiest: float = 1.0,
        recompute: bool = False,
    ) -> None:
        self.source, self.target, self.shared, self.recompute = source, target, shared, recompute
        self.temporal, self.noisiest = source.temporal, noisiest

    def stills(self, x0: Tensor, picks: Picks) -> Stills:
        columns = list(zip(*picks, strict=True))
        whole = [self.shared and not any(column) for column in columns]
        if all(whole):
            return Stills(x0[:, :, :1].repeat_interleave(len(columns), dim=0))
        left = [column for column, same in zip(columns, whole, strict=True) if not same]
        frames = decode_frames(self.source, x0, list(zip(*left, strict=True)), recompute=self.recompute)
        encoded = self._encoded(frames)
        decoded = iter(encoded.unbind(1))
        parts = [x0[:, :, :1] if same else next(decoded) for same in whole]
        return Stills(torch.stack(parts, dim=1).flatten(0, 1), figures_of(frames.detach()))

    def _encoded(self, frames: Tensor) -> Tensor:
        """Latents ``[B, n, C, 1, h, w]`` of frames ``[B, 3, n, H, W]``."""
        batch, _, count = frames.shape[:3]
        stills = resized(frames.transpose(1, 2).flatten(0, 1), self.target.frame_size)
        latents = self.target.encode(stills[:, :, None], gradient=True)
        return latents.view(batch, count, *latents.shape[1:])


def decode_frames(codec: VideoCodec, latents: Tensor, picks: Picks, *, recompute: bool = False) -> Tensor:
    """Some video frames ``[B, 3, n, H, W]`` of each sample, with the gradient of their own latent frame alone.

    They are those of the codec's ``decode`` with ``gradient``. ``picks`` are ``n`` numbers of video frames per sample.
    """
    if isinstance(codec, FrameCodec):
        return codec.decode_frames(latents, picks, recompute=recompute)
    return whole_decodes(codec, latents, picks, recompute=recompute)


def whole_decodes(codec: VideoCodec, latents: Tensor, picks: Picks, *, recompute: bool = False) -> Tensor:
    """:func:`decode_frames` by one decode of the whole videos per pick of a sample."""
    found, rows, decode = [], range(len(latents)), partial(codec.decode, gradient=True)
    for frames in zip(*picks, strict=True):
        own = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
        for row, frame in zip(rows, frames, strict=True):
            own[row, latent_frame(frame, codec.temporal)] = True
        only = latents.where(own[:, None, :, None, None], latents.detach())
        videos = checkpoint(decode, only, use_reentrant=False) if recompute else decode(only)
        found.append(torch.stack([videos[row, :, frame] for row, frame in zip(rows, frames, strict=True)]))
    return torch.stack(found, dim=2)


def resized(stills: Tensor, size: tuple[int, int]) -> Tensor:
    """Stills ``[N, 3, H, W]`` at another size: bicubic with antialiasing down, bilinear up; linear in the pixels."""
    if stills.shape[2:] == size:
        return stills
    if min(new / old for new, old in zip(size, stills.shape[2:], strict=True)) < 1:
        return functional.interpolate(stills, size, mode="bicubic", antialias=True)
    return functional.interpolate(stills, size, mode="bilinear")


def figures_of(frames: Tensor) -> dict[str, Tensor]:
    """Share of pixels beyond ``[-1, 1]``, and sharpness (mean squared Laplacian), of frames ``[B, 3, n, H, W]``."""
    centre = frames[..., 1:-1, 1:-1]
    across = frames[..., 1:-1, :-2] + frames[..., 1:-1, 2:] + frames[..., :-2, 1:-1] + frames[..., 2:, 1:-1]
    return {
        "clipped_pixels": (frames.abs() > 1).float().mean(),
        "sharpness": (across - 4 * centre).square().mean(),
    }
