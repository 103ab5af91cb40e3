"""Streams of the tiny world whose course is known frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.tiny.captions import DIRECTIONS, parse_caption
from fastvideo.tiny.render import Motion, render
from fastvideo.tiny.switches import SwitchPair
from fastvideo.tiny.world import SIZE, split_images, torus

COLOURS = torch.tensor([(1, 0.1, 0.1), (0.1, 0.9, 0.1), (0.2, 0.3, 1), (1, 0.95, 0.1), (0.1, 0.95, 1), (1, 0.15, 1)])
WHITE = torch.ones(1, 3)


def unit(direction: int) -> Tensor:
    """Unit vector of a direction, x to the right and y downwards."""
    words = DIRECTIONS[direction].split(" and ")
    vector = torch.tensor([("right" in words) - ("left" in words), ("down" in words) - ("up" in words)]).float()
    return vector / vector.norm()


def switched(pair: SwitchPair, frames: int, at: int, speed: float = 1.0) -> Tensor:
    """A stream ``[1, 3, frames, 32, 32]`` that shows the second caption, and moves so, from frame ``at`` on."""
    looks = [parse_caption(text) for text in (pair.before, pair.after)]
    moved = [speed * unit(look.direction) for look in looks]
    each = torch.stack([moved[int(frame >= at)] for frame in range(frames)])
    motion = Motion.draw(torch.full((1, 6), 0.5), moved[0][None], frames, SIZE, wrap=True)
    motion = Motion(motion.affine, 16 + each.cumsum(0)[None])
    images, labels = split_images("heldout")
    drawn = [
        render(
            images[(labels == look.digit).nonzero()[3]],
            torch.cat([COLOURS, WHITE])[look.colour][None],
            motion,
            frames,
            SIZE,
            wrap=True,
        )
        for look in looks
    ]
    return torch.cat([drawn[0][:, :, :at], drawn[1][:, :, at:]], dim=2)


def real(count: int, frames: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Real held-out streams and their captions."""
    sample = torus("heldout", frames).sample(count, seed)
    return sample.videos, sample.captions
