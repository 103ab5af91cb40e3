"""Losses by chunk: a critic that lags behind a causal student does so first at the end of its videos."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastvideo.distillation.chunks import spans
from fastvideo.distillation.types import Batch


def means_by_chunk(name: str, squares: Tensor, batch: Batch, chunk: int) -> Mapping[str, Tensor]:
    """Mean of ``squares`` ``[B, C, F, H, W]`` in each scored chunk, as metrics ``{name}/chunk-1`` and so on.

    There are none beside conditioning frames, whose number may differ from sample to sample.
    """
    if batch.condition.given is not None:
        return {}
    scored = squares[:, :, batch.unscored :]
    runs = spans(scored.shape[2], min(chunk, scored.shape[2]))
    return {f"{name}/chunk-{i}": scored[:, :, a:b].mean() for i, (a, b) in enumerate(runs, start=1)}
