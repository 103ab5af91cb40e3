"""Admission of a frame teacher: on real frames it must be better than what has learnt the student's frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.methods.distribution_matching.frame_term import FrameTerm
from fastvideo.distillation.types import Batch


@torch.no_grad()
def errors_on_real_frames(term: FrameTerm, batch: Batch) -> Tensor:
    """Mean squared errors of clean estimates of noised real frames, float64, and a 1 that counts them.

    They are the frame teacher's, its own without the caption, and those of the frame critic. The excess of the critic's
    over the best possible error, summed over noise levels, is the divergence of the student's frames from real ones;
    the teacher's is that of its own. All three see the same noise, at the levels of the frame term.
    """
    seen = term.frames(batch.latents, batch, gradient=False)
    x0 = seen.stills.latents
    x_t, t, _ = term.noised(x0, seen, term.config.frame_time_range)
    estimates = (
        term.teacher.x0(x_t, t, seen.condition),
        term.teacher.x0(x_t, t, seen.negative),
        term.critic.x0(x_t, t, seen.condition),
    )
    errors = [(estimate - x0).square().mean().double() for estimate in estimates]
    return torch.stack([*errors, torch.ones_like(errors[0])])


@dataclass(frozen=True)
class Admission:
    """Means of :func:`errors_on_real_frames` over ``batches``, at the noise levels ``times``."""

    teacher: float
    without_caption: float
    critic: float
    batches: int
    times: tuple[float, float]

    @classmethod
    def of(cls, sums: Tensor, times: tuple[float, float]) -> Admission:
        """From sums over batches."""
        count = float(sums[-1])
        teacher, without, critic = (sums[:-1] / max(count, 1.0)).tolist()
        return cls(teacher, without, critic, int(count), times)

    @property
    def refusal(self) -> str | None:
        """Sentence with the reason for which the teacher is not admitted; ``None`` if it is."""
        if not self.batches:
            return "it was tested on no batch of real frames"
        if not self.teacher < self.critic:
            return "it knows real frames no better than what has learnt the student's, and would make these worse"
        if not self.teacher < self.without_caption:
            return "it is no better with the caption than without it: it does not read captions"
        return None

    @property
    def numbers(self) -> str:
        """The errors, in words."""
        low, high = self.times
        return (
            f"squared error on real frames at t {low:g} to {high:g}, over {self.batches} batches: frame teacher "
            f"{self.teacher:.4g}, without the caption {self.without_caption:.4g}, frame critic after the student's "
            f"frames {self.critic:.4g}"
        )
