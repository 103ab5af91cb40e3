"""Captions that a training leaves out for a share of its samples, so that a network can be guided."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.types import Batch, Condition


def without_captions(batch: Batch, keep: Tensor) -> Condition:
    """The batch's condition where ``keep`` (bool ``[B]``) is true, the negative one elsewhere.

    Conditioning frames stay.
    """

    def chosen(value: Tensor, fallback: Tensor) -> Tensor:
        return value.where(keep.view(-1, *[1] * (value.ndim - 1)), fallback)

    joined = {
        key: {name: chosen(value, batch.negative.of(key)[name]) for name, value in tensors.items()}
        for key, tensors in batch.condition.tensors.items()
    }
    return Condition(joined, batch.condition.given)
