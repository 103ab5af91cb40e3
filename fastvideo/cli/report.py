"""``fastvideo report``: write the page of one run, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastvideo.cli.arguments import OptionalFile, parse
from fastvideo.cli.console import patience
from fastvideo.files import readable_size


@dataclass(frozen=True)
class ReportArguments:
    """Write a page from run folders: one run's own page, or several runs side by side. Nothing is generated again."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT...", help_behavior_hint="")]
    """Run folders, as `fastvideo distill --output`, `fastvideo evaluate --out` and the demo leave them."""
    out: OptionalFile = None
    """The page, a name that ends in .html. Default: OUT/report.html for one run, compare.html for several."""


def main(argv: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    arguments = parse(ReportArguments, argv, "report")
    from fastvideo.evaluation.report import write_report

    with patience("reading the runs and writing the page"):
        path = write_report(arguments.folders, arguments.out)
    print(f"{path}: {readable_size(path.stat().st_size)}, open it in a browser")
    return 0
