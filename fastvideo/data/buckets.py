"""The buckets of a dataset as a table."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from fastvideo.data.index import FileIndex, dataset_files, index_file, latent_shape
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


def show_buckets(path: str, batch_size: int, ranks: int) -> None:
    """Print the table.

    Raises:
        UserError: if a file of the dataset is not readable, or has no latents.
    """
    files = [index_file(file, [LATENT]) for file in dataset_files(path)]
    shard = Shard(batch_size, 0, ranks)
    table = Table(title=f"{path}: batches of {batch_size} on each of {ranks} processes")
    for column in ("latents C x F x H x W", "videos", "steps per epoch", "left out", "why"):
        table.add_column(column, justify="left" if column[0] in "lw" and column != "left out" else "right")
    total = [0, 0, 0]
    for shape, count in bucket_sizes(files).items():
        steps = count // shard.per_round
        left = count - steps * shard.per_round
        total = [a + b for a, b in zip(total, (count, steps, left), strict=True)]
        table.add_row(" x ".join(map(str, shape)), str(count), str(steps), str(left), why_left_out(steps, left, shard))
    table.add_section()
    table.add_row("all", *map(str, total), "")
    console = Console()
    console.print(table)
    without = sum(file.tensors[LATENT].missing for file in files)
    skipped = sum(len(file.made.get("skipped", ())) for file in files)
    if without:
        console.print(f"{without} rows have no latents: a run that trains on videos refuses this dataset")
    if skipped:
        console.print(f"{skipped} videos were skipped when it was made: see skipped.jsonl in its folder")


def why_left_out(steps: int, left: int, shard: Shard) -> str:
    """Why samples of a bucket take no part in an epoch."""
    if not left:
        return ""
    if not steps:
        return f"fewer than one step takes ({shard.per_round})"
    return f"incomplete last step ({left} of {shard.per_round}), others each epoch"
