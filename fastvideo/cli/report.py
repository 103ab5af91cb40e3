"""``fastvideo report``: read the runs, choose the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastvideo.cli.arguments import OptionalFile, parse
from fastvideo.cli.console import patience, readable_size
from fastvideo.errors import UserError

COMPARISON = Path("compare.html")


@dataclass(frozen=True)
class ReportArguments:
    """Write a page from run folders: one run's own page, or several runs side by side. Nothing is generated again."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT...", help_behavior_hint="")]
    """Run folders, as `fastvideo distill --output`, `fastvideo evaluate --out` and the demo leave them."""
    out: OptionalFile = None
    """The page, a name that ends in .html. Default: OUT/report.html for one run, compare.html for several."""


def main(argv: Sequence[str]) -> int:
    """Write the page; the exit code."""
    arguments = parse(ReportArguments, argv, "report")
    with patience("reading the runs and writing the page"):
        path = run_report(arguments)
    print(f"{path}: {readable_size(path.stat().st_size)}, open it in a browser")
    return 0


def run_report(arguments: ReportArguments) -> Path:
    """Write the page that the arguments ask for; an earlier page there is replaced.

    Raises:
        UserError: for no folder or too many, a folder that is no run, a damaged file, or an ``--out`` that is no page.
    """
    from fastvideo.evaluation.report import write_report
    from fastvideo.evaluation.report_compare import MOST_RUNS, write_comparison
    from fastvideo.evaluation.report_run import read_runs

    if not arguments.folders:
        raise UserError("report: give one or several run folders")
    if len(arguments.folders) > MOST_RUNS:
        raise UserError(f"report: at most {MOST_RUNS} runs can be told apart on one page, got {len(arguments.folders)}")
    alone = len(arguments.folders) == 1
    path = arguments.out or (arguments.folders[0] / "report.html" if alone else COMPARISON)
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"--out {path}: the name of a page, ending in .html, is expected")
    runs = read_runs(arguments.folders)
    return write_report(path, runs[0]) if alone else write_comparison(path, runs)
