"""Batches of one family, as tests make them."""

from __future__ import annotations

from typing import Any

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.batches import BatchPreparer


def preparer(adapter: DistillAdapter[Any]) -> BatchPreparer:
    """Data to batches of that family alone."""
    return BatchPreparer(adapter.codec, [adapter.conditioner])
