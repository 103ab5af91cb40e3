"""The truth as a model: a streamer that draws the torus world itself, with the interface of a real one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastvideo.errors import UserError
from fastvideo.inference.stream_stats import StreamStats
from fastvideo.sampling_ranges import ON_SWITCH
from fastvideo.tiny.captions import COLOURS, DIRECTIONS, Attributes, parse_caption
from fastvideo.tiny.render import Motion, render
from fastvideo.tiny.world import _RGB, _VECTORS, SIZE, split_images

SPEED, HALF_SIDE = 1.0, 7.5
BROKEN = "a white zero moving up"
"""A prompt at which the model fails."""
REFUSED = "a white one moving up"
"""A prompt that the model itself refuses."""


@dataclass(frozen=True)
class Scene:
    """A moment of a world: what is asked for, and where it is."""

    asked: Attributes
    centre: tuple[float, float] = (16.0, 16.0)
    frames: int = 0
    waiting: str | None = None


class WorldStream:
    """A video of the torus that follows its prompts at once."""

    def __init__(self, scene: Scene, seconds: float) -> None:
        self._scene, self._seconds = scene, seconds
        self.images, self.labels = split_images("heldout")

    def __next__(self) -> npt.NDArray[np.uint8]:
        if self._scene.waiting == BROKEN:
            raise RuntimeError("the network is broken")
        time.sleep(self._seconds)
        count = 1 if self._scene.frames == 0 else 4
        centres = torch.tensor([self._step() for _ in range(count)])
        asked = self._scene.asked
        image = self.images[self.labels == (asked.digit or 0)][:1]
        colour = torch.tensor([_RGB[COLOURS[asked.colour or 0]]])
        affine = torch.linalg.inv(HALF_SIDE * torch.eye(2))[None]
        video = render(image, colour, Motion(affine, centres[None]), count, SIZE, wrap=True)[0]
        return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()

    def _step(self) -> tuple[float, float]:
        x, y = self._scene.centre
        right, down = _VECTORS[DIRECTIONS[self._scene.asked.direction or 0]]
        now = (x + SPEED * right, y + SPEED * down)
        self._scene = replace(self._scene, centre=now, frames=self._scene.frames + 1)
        return now

    def prompt(self, text: str, on_switch: str = ON_SWITCH) -> None:
        if text == REFUSED:
            raise UserError("the model itself refuses this")
        start = Scene(parse_caption(text)) if on_switch == "cut" else replace(self._scene, asked=parse_caption(text))
        self._scene = replace(start, waiting=text)

    def snapshot(self) -> Scene:
        return self._scene

    @property
    def stats(self) -> StreamStats:
        ms = 1000 * self._seconds
        return StreamStats(self._scene.frames, 1, 12.0, 3 * ms, ms, ms, ms, 40.0, 200_000, 50_000)


@dataclass(frozen=True)
class WorldStreamer:
    """A streamer whose model takes ``seconds`` for a chunk."""

    seconds: float = 0.0

    def open(self, prompt: str, given: None = None) -> Any:
        return WorldStream(Scene(parse_caption(prompt)), self.seconds)

    def resume(self, scene: Scene) -> Any:
        return WorldStream(scene, self.seconds)
