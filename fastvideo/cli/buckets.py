"""``fastvideo buckets show DATA``: sizes of a dataset, and the batches that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastvideo.cli.arguments import parse
from fastvideo.cli.console import console
from fastvideo.ranges import Processes
from fastvideo.sampling_ranges import BatchSize
from fastvideo.wording import counted


@dataclass(frozen=True)
class BucketsArguments:
    """Show the sizes in a dataset, the number of batches of each per epoch, and the videos that no batch takes."""

    action: Annotated[Literal["show"], tyro.conf.Positional]
    """Action: show."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A Parquet file or a folder of them."""
    batch_size: BatchSize = 1
    """Samples per process and batch."""
    ranks: Processes = 1
    """Processes of the run."""


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    arguments = parse(BucketsArguments, argv, "buckets")
    show_buckets(arguments.data, arguments.batch_size, arguments.ranks)
    return 0


def show_buckets(path: str, batch_size: int, ranks: int) -> None:
    """Print the table.

    Raises:
        UserError: if a file of the dataset is not readable, or has no latents.
    """
    from rich.table import Table

    from fastvideo.data.index import bucket_sizes, dataset_files, index_file
    from fastvideo.data.order import Shard
    from fastvideo.data.schema import LATENT

    files = [index_file(file, [LATENT]) for file in dataset_files(path)]
    shard = Shard(batch_size, 0, ranks)
    table = Table(title=f"{path}: batches of {batch_size} on each of {counted(ranks, 'process')}")
    for column in ("latents C x F x H x W", "videos", "steps per epoch", "left out", "why"):
        table.add_column(column, justify="left" if column[0] in "lw" and column != "left out" else "right")
    total = [0, 0, 0]
    for shape, count in bucket_sizes(files).items():
        steps, left = divmod(count, shard.per_round)
        total = [a + b for a, b in zip(total, (count, steps, left), strict=True)]
        table.add_row(" x ".join(map(str, shape)), str(count), str(steps), str(left), shard.why_skipped(count))
    table.add_section()
    table.add_row("all", *map(str, total), "")
    out = console()
    out.print(table)
    without = sum(file.tensors[LATENT].missing for file in files)
    skipped = sum(len(file.made.get("skipped", ())) for file in files)
    if without:
        out.print(f"{without} rows have no latents: a run that trains on videos refuses this dataset")
    if skipped:
        out.print(f"{skipped} videos were skipped when it was made: see skipped.jsonl in its folder")
