"""Bytes that roles keep on a device from step to step, from the shapes of their networks, before any is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from fastvideo.distillation.engine.eight_bit import moment_bytes
from fastvideo.distillation.engine.optim import States

FLOAT32 = 4
MOMENTS = 2


def local_numel(tensor: Tensor, shard: int) -> int:
    """Elements of the first process's part of a tensor: rows are split, and the first has the most."""
    if shard == 1 or tensor.ndim == 0:
        return tensor.numel()
    return math.ceil(tensor.shape[0] / shard) * math.prod(tensor.shape[1:])


def optimizer_bytes(parameters: Iterable[Tensor], shard: int, states: States) -> int:
    """AdamW's two moments and a step counter per parameter."""
    found = 0
    for p in parameters:
        own = local_numel(p, shard)
        found += MOMENTS * (moment_bytes(p.shape, own) if states == "8bit" else own * FLOAT32) + FLOAT32
    return found
