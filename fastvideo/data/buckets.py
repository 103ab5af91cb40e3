"""The sizes in a dataset, and what batches of one size leave out."""

from __future__ import annotations

from collections import Counter

from fastvideo.data.index import FileIndex, latent_shape
from fastvideo.data.order import Shard
from fastvideo.data.schema import LATENT


def bucket_sizes(files: list[FileIndex]) -> dict[tuple[int, ...], int]:
    """Rows by latent shape ``(C, F, H, W)``."""
    counts: Counter[tuple[int, ...]] = Counter()
    for file in files:
        index = file.tensors[LATENT]
        for code, (shape, _) in enumerate(index.kinds):
            counts[latent_shape(shape)] += int((index.codes == code).sum())
    return dict(sorted(counts.items()))


def why_left_out(steps: int, left: int, shard: Shard) -> str:
    """Why samples of a bucket take no part in an epoch."""
    if not left:
        return ""
    if not steps:
        return f"fewer than one step takes ({shard.per_round})"
    return f"incomplete last step ({left} of {shard.per_round}), others each epoch"
