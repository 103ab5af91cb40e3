"""``fastvideo report``: options, free of heavy imports so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class ReportArguments:
    """Write a page from run folders: one run's own page, or several runs side by side. Nothing is generated again."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT...", help_behavior_hint="")]
    """Run folders, as `fastvideo distill --output`, `fastvideo evaluate --out` and the demo leave them."""
    out: OptionalFile = None
    """The page, a name that ends in .html. Default: OUT/report.html for one run, compare.html for several."""


def main(argv: Sequence[str]) -> int:
    """Write the page; the exit code."""
    arguments = tyro.cli(ReportArguments, args=list(argv), prog="fastvideo report")

    from fastvideo.evaluation.report import size_of, write_report

    path = write_report(arguments.folders, arguments.out)
    print(f"{path}: {size_of(path)}, open it in a browser")
    return 0
