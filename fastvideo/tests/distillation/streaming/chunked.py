"""Videos chunk by chunk, as their students stream them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.chunks import Past, Reach, per_frame, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.types import Condition


def chunk_times(frames: int, chunk: int) -> Tensor:
    """A time per chunk, the same for both samples, ``[2, F]``."""
    count = len(spans(frames, chunk))
    return per_frame(torch.linspace(0.2, 0.9, count).expand(2, count), frames, chunk)


@torch.no_grad()
def streamed(
    student: Denoiser, x: Tensor, t: Tensor, condition: Condition, reach: Reach, clean: Tensor | None = None
) -> Tensor:
    """Predictions chunk by chunk, after commits of noisy chunks at their own times, or of clean ones at 0."""
    assert isinstance(student.adapter, DistillAdapter)
    by_frame = "frame_times" in student.adapter.supports
    past, found = Past(reach), []
    for start, end in spans(x.shape[2], reach.chunk):
        chunk, own = x[:, :, start:end], t[:, start:end] if by_frame else t[:, start]
        found.append(student.velocity(chunk, own, condition, context=past))
        seen, time = (chunk, float(t[0, start])) if clean is None else (clean[:, :, start:end], 0.0)
        past = student.commit(past, seen, condition, time)
    return torch.cat(found, dim=2)
