"""A metric of a model's videos: it observes each video once, as numbers, and makes figures of all numbers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.base import Codec
from fastvideo.evaluation.statistics import Estimate

Seen = Mapping[str, Tensor]
"""Numbers of the videos that a metric observed, by name, each ``[N, ...]``."""
Figures = dict[str, Estimate | float]
"""Figures by name: with an interval, or plain ones such as a floor."""


@dataclass
class Batch:
    """Videos of one model: latents ``[B, C, F, H, W]``, with the prompt and the noise seed of each."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    latents: Tensor
    codec: Codec
    decode_seconds: list[float] = field(default_factory=list)
    """Seconds per video, once they are decoded."""

    @cached_property
    def videos(self) -> Tensor:
        """Float32 ``[B, 3, T, H, W]`` in ``[-1, 1]`` on the CPU; decoded if a metric needs pixels."""
        begin = time.perf_counter()
        videos = self.codec.decode(self.latents.to(self.codec.device)).float().cpu().clamp(-1, 1)
        self.decode_seconds.append((time.perf_counter() - begin) / len(videos))
        return videos


class Metric(ABC):
    """A quantity of a model's videos, compared with those of its teacher."""

    of_seeds: ClassVar[bool] = False
    """Observes several seeds of some prompts, prompt by prompt, instead of one video per prompt."""

    @abstractmethod
    def observe(self, batch: Batch) -> Seen:
        """The numbers of a batch."""

    @abstractmethod
    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        """Figures of a model, from its numbers and its teacher's.

        Args:
            seen: the model's numbers.
            teacher: those of its teacher.
            counts: bootstrap counts ``[R, P]`` of the prompts.
        """
