"""Validation: fixed prompts, fixed noise, the training sampler.

It draws from streams of its own and only reads weights, so it changes the training trajectory by not one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.ema import has_average
from fastvideo.stopping import Stopped

Sample = Callable[[Denoiser], Tensor | None]
"""Generates videos ``[B, 3, T, H, W]`` for the fixed prompts and noise, on the main process; the others take part
and get ``None``."""


@dataclass(frozen=True)
class ValidationSinks:
    """Outputs of a validation."""

    log: Callable[[Mapping[str, float], int], None]
    write_video: Callable[[Path, Tensor], None]
    score: Callable[[Tensor], Mapping[str, float]] | None = None
    health: Callable[[int], Mapping[str, float]] | None = None
    """Measures the run itself, given the step; every process of the validation calls it."""


class ValidationHook:
    """Every ``every`` steps: sample live and averaged weights on all processes; the main one scores and keeps them.

    Args:
        weights: which of the two are sampled.
    """

    def __init__(
        self,
        handle: RoleHandle,
        sample: Sample | None,
        sinks: ValidationSinks | None,
        folder: Path,
        *,
        every: int,
        weights: Literal["both", "live", "ema"] = "both",
    ) -> None:
        self.handle, self.sample, self.sinks, self.folder = handle, sample, sinks, folder
        self.every, self.weights, self.validated = every, weights, 0

    def due(self, step: int) -> bool:
        """True if this step is validated."""
        return bool(self.every) and step % self.every == 0

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Validate if this step is due; :meth:`resume` makes up for one that a signal cuts off."""
        if self.due(step):
            with suppress(Stopped):
                self.run(step)
                self.validated = step

    def resume(self, step: int) -> None:
        """Validate the step of a checkpoint, if that is due and was not finished."""
        if self.validated != step:
            self.after_step(step, ())

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Sample, score, write."""
        if self.sample is None or self.sinks is None:
            return
        scores = dict[str, float]()
        if self.weights != "ema" or not has_average(self.handle):
            scores |= self._show("student", self.sample(self.handle), step, self.sinks)
        if self.weights != "live" and has_average(self.handle):
            with self.handle.averaged():
                scores |= self._show("ema", self.sample(self.handle), step, self.sinks)
        if self.sinks.health is not None:
            scores |= self.sinks.health(step)
        self.sinks.log(scores, step)

    def _show(self, name: str, videos: Tensor | None, step: int, sinks: ValidationSinks) -> dict[str, float]:
        if videos is None:
            return {}
        sinks.write_video(self.folder / f"step-{step:06d}-{name}.mp4", side_by_side(videos[:8]))
        found = sinks.score(videos) if sinks.score is not None else {}
        return {f"validation/{name}/{key}": value for key, value in found.items()}

    def state_dict(self) -> dict[str, int]:
        """Last validated step."""
        return {"validated": self.validated}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.validated = int(state["validated"])


def side_by_side(videos: Tensor) -> Tensor:
    """Join ``[B, 3, T, H, W]`` into one wide video ``[3, T, H, B W]``."""
    return torch.cat(list(videos), dim=-1)
