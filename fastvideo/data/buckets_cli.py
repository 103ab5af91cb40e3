"""``fastvideo buckets show DATA``: what a dataset's sizes mean for batches; free of heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class BucketsArguments:
    """Show which sizes a dataset has, how many batches each gives per epoch, and what is left out."""

    action: Annotated[Literal["show"], tyro.conf.Positional]
    """What to do."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A Parquet file or a folder of them."""
    batch_size: int = 1
    """Samples per process and batch."""
    ranks: int = 1
    """Processes of the run."""


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit code."""
    arguments = tyro.cli(BucketsArguments, args=list(argv), prog="fastvideo buckets")

    from fastvideo.data.buckets import show_buckets
    from fastvideo.errors import UserError

    for name in ("batch_size", "ranks"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    show_buckets(arguments.data, arguments.batch_size, arguments.ranks)
    return 0
