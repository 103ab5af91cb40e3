"""The tiny world: videos of real handwritten digits, coloured, moving, with captions that name some of it.

A caption names the digit, the colour and the direction of motion, and leaves each of the three open with its own fixed
probability. An open attribute makes the distribution of videos given the caption multi-modal, which few-step sampling
blurs: there is something to distil.

Everything is a pure function of (split, seed, n): the same arguments give the same bits, and the first k samples of a
longer draw are the samples of a draw of length k.

The streaming world (:func:`torus`) is the same world without edges: a digit that leaves on one side comes back on the
other, so motion never ends, a caption stays true, and a video of any length begins with the frames of a shorter one.

The soft world (:func:`soft`) is the same world at half resolution: motion and colour are all there, and one digit in
four cannot be read. Its stills (:func:`stills`) are sharp. So videos teach motion, and stills teach digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes, caption_of, parse_caption
from fastvideo.tiny.render import Motion, render

Split = Literal["train", "heldout"]
View = Literal["sharp", "soft", "still"]

FRAMES = 9
SIZE = 32  # pixels, height and width
# Of digit, colour and direction, independently. Guidance sharpens named attributes and so hides the losses of few-step
# sampling; captions mostly leave colour and direction open.
OPEN_PROBABILITIES = (0.15, 0.8, 0.8)
TRAIN_SHARE = 0.8
STREAM_FRAMES = 33  # of a video of the streaming world that networks are trained on
STREAM_OPEN_PROBABILITIES = (0.15, 0.4, 0.4)  # a prompt switch needs attributes that are named

# Unit vectors in image coordinates (x to the right, y downwards), in the order of DIRECTIONS.
_DIAGONAL = 2**-0.5
_VECTORS = {
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up and left": (-_DIAGONAL, -_DIAGONAL),
    "up and right": (_DIAGONAL, -_DIAGONAL),
    "down and left": (-_DIAGONAL, _DIAGONAL),
    "down and right": (_DIAGONAL, _DIAGONAL),
}
# A little light in the "off" channels keeps the colours from being pure primaries.
_RGB = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "cyan": (0.1, 0.95, 1.0),
    "magenta": (1.0, 0.15, 1.0),
    "white": (1.0, 1.0, 1.0),
}
_SPLIT_ID: dict[Split, int] = {"train": 0, "heldout": 1}
LOOKS = 10  # numbers of WorldSample.look
_COLUMNS = 6 + LOOKS  # uniform numbers drawn per video; a fixed width keeps draws of different lengths aligned


@dataclass(frozen=True)
class WorldSample:
    """`n` videos with their attributes.

    Attributes:
        videos: float32 [n, 3, frames, 32, 32] in [-1, 1].
        captions: n texts.
        digit: int64 [n], 0-9: the truth, also if the caption does not name it.
        colour: int64 [n], index into COLOURS.
        direction: int64 [n], index into DIRECTIONS.
        named: bool [n, 3], which of (digit, colour, direction) the caption names.
        look: float32 [n, 10] in [0, 1], uniform numbers that no caption names: size, tilt, slant, speed, start (x, y),
            brightness, hue (r, g, b).
    """

    videos: torch.Tensor
    captions: list[str]
    digit: torch.Tensor
    colour: torch.Tensor
    direction: torch.Tensor
    named: torch.Tensor
    look: torch.Tensor


@lru_cache(maxsize=2)
def split_images(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit images of a split: float32 [m, 8, 8] in [0, 1] and int64 labels [m]. No image is in both splits."""
    from sklearn.datasets import load_digits  # imported late: it takes a second that `--help` must not pay

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = int(TRAIN_SHARE * len(order))
    chosen = order[:cut] if split == "train" else order[cut:]
    images = torch.from_numpy(data.images[chosen] / 16.0).float()
    return images, torch.from_numpy(data.target[chosen]).long()


class TinyWorld:
    """Draws videos and captions from the handwritten digits of a split.

    Args:
        frames: of each video.
        wrap: digits move over a torus, without end.
        open_probabilities: of digit, colour and direction, to be left out of a caption.
        view: the videos as they are (sharp), at half resolution (soft), or one frame of each (still), any of them.
    """

    def __init__(
        self,
        split: Split,
        frames: int = FRAMES,
        wrap: bool = False,
        open_probabilities: tuple[float, float, float] = OPEN_PROBABILITIES,
        view: View = "sharp",
    ) -> None:
        if split not in _SPLIT_ID:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(_SPLIT_ID)}")
        self.split: Split = split
        self.frames, self.wrap, self.view = frames, wrap, view
        self.open_probabilities = np.array(open_probabilities)
        self.images, self.labels = split_images(split)

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that a sample depends on beside its number and seed."""
        view = () if self.view == "sharp" else (self.view,)
        return (self.split, self.frames, self.wrap, *self.open_probabilities.tolist(), *view)

    def sample(self, n: int, seed: int) -> WorldSample:
        """The first `n` videos of the stream `seed`."""
        return self._build(self._uniforms(n, seed))

    def sample_captions(self, n: int, seed: int) -> list[str]:
        """The captions of `sample(n, seed)`, without rendering a video."""
        return self._captions(self._uniforms(n, seed))

    def batches(self, n: int, seed: int, batch_size: int) -> Iterator[WorldSample]:
        """`sample(n, seed)` in pieces of at most `batch_size`, so that memory stays small."""
        uniforms = self._uniforms(n, seed)
        for start in range(0, n, batch_size):
            yield self._build(uniforms[start : start + batch_size])

    def _uniforms(self, n: int, seed: int) -> npt.NDArray[np.float64]:
        if n < 1:
            raise ValueError(f"a sample needs at least one video, got n={n}")
        numbers = np.random.default_rng([seed, _SPLIT_ID[self.split]]).random((n, _COLUMNS))
        moments = np.random.default_rng([seed, _SPLIT_ID[self.split], 1]).random((n, 1))
        return np.hstack([numbers, moments])

    def _truth(self, u: npt.NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image index, colour index, direction index (each int64 [n]) and the named mask (bool [n, 3])."""
        image = torch.from_numpy((u[:, 0] * len(self.labels)).astype(np.int64))
        colour = torch.from_numpy((u[:, 1] * len(COLOURS)).astype(np.int64))
        direction = torch.from_numpy((u[:, 2] * len(DIRECTIONS)).astype(np.int64))
        return image, colour, direction, torch.from_numpy(u[:, 3:6] >= self.open_probabilities)

    def _captions(self, u: npt.NDArray[np.float64]) -> list[str]:
        image, colour, direction, named = self._truth(u)
        truth = torch.stack([self.labels[image], colour, direction], dim=1).tolist()
        pairs = zip(truth, named.tolist(), strict=True)
        visible = [[v if show else None for v, show in zip(*row, strict=True)] for row in pairs]
        return [caption_of(Attributes(*row)) for row in visible]

    def _build(self, u: npt.NDArray[np.float64]) -> WorldSample:
        image, colour, direction, named = self._truth(u)
        unit = torch.tensor([_VECTORS[name] for name in DIRECTIONS])[direction]
        rgb = torch.tensor([_RGB[name] for name in COLOURS])[colour]
        look = torch.from_numpy(u[:, 6:16]).float()
        motion = Motion.draw(look[:, :6], unit, self.frames, SIZE, self.wrap)
        rgb = jitter_colour(rgb, look[:, 6:])
        videos = self._seen(render(self.images[image], rgb, motion, self.frames, SIZE, self.wrap), u[:, _COLUMNS])
        return WorldSample(videos, self._captions(u), self.labels[image], colour, direction, named, look)

    def _seen(self, videos: torch.Tensor, moments: npt.NDArray[np.float64]) -> torch.Tensor:
        """The view of `videos` [n, 3, frames, 32, 32]; `moments` [n] in [0, 1) choose a still's frame."""
        if self.view == "sharp":
            return videos
        if self.view == "soft":
            return soften(videos)
        frames = torch.from_numpy((moments * self.frames).astype(np.int64))
        return videos[torch.arange(len(videos)), :, frames].unsqueeze(2)


def soften(videos: torch.Tensor) -> torch.Tensor:
    """Videos [n, 3, frames, height, width] at half resolution, bilinearly brought back to their size."""
    frames = videos.transpose(1, 2).flatten(0, 1)
    small = F.avg_pool2d(frames, 2)
    back = F.interpolate(small, size=frames.shape[2:], mode="bilinear", align_corners=False)
    return back.view(videos.transpose(1, 2).shape).transpose(1, 2).contiguous()


def torus(split: Split, frames: int = STREAM_FRAMES) -> TinyWorld:
    """The streaming world."""
    return TinyWorld(split, frames, wrap=True, open_probabilities=STREAM_OPEN_PROBABILITIES)


def soft(split: Split, frames: int = FRAMES) -> TinyWorld:
    """The soft world."""
    return TinyWorld(split, frames, view="soft")


def stills(split: Split, frames: int = 1) -> TinyWorld:
    """Single frames of the sharp world's videos, with the captions of these."""
    if frames != 1:
        raise ValueError(f"a still is a video of one frame, not of {frames}")
    return TinyWorld(split, view="still")


WORLDS: Mapping[str, Callable[[Split, int], TinyWorld]] = {
    "tiny": TinyWorld,
    "tiny_stream": torus,
    "tiny_soft": soft,
    "tiny_stills": stills,
}
"""Worlds of a split, with the frames of a video, by the name that stands for their data."""


def jitter_colour(rgb: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Vary brightness (0.8-1) and hue slightly. `rgb` [n, 3] in [0, 1], `u` [n, 4] uniform in [0, 1]."""
    brightness = 0.8 + 0.2 * u[:, :1]
    hue = 0.12 * (u[:, 1:] - 0.5)
    return ((rgb + hue) * brightness).clamp(0.0, 1.0)


def switched_captions(captions: Sequence[str], seed: int) -> list[str]:
    """For each caption another that differs in exactly one attribute, one that it names; an open one names a motion."""
    draws = np.random.default_rng([seed, len(_SPLIT_ID)]).random((len(captions), 2))
    return [_switched(caption, *draw) for caption, draw in zip(captions, draws.tolist(), strict=True)]


def _switched(caption: str, which: float, other: float) -> str:
    values = {"digit": len(DIGITS), "colour": len(COLOURS), "direction": len(DIRECTIONS)}
    attributes = parse_caption(caption)
    named = [name for name in values if getattr(attributes, name) is not None] or ["direction"]
    name = named[int(which * len(named))]
    old, count = getattr(attributes, name), values[name]
    new = int(other * count) if old is None else (old + 1 + int(other * (count - 1))) % count
    return caption_of(replace(attributes, **{name: new}))
