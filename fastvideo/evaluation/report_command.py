"""``fastvideo report``: read the runs, choose the page."""

from __future__ import annotations

from pathlib import Path

from fastvideo.errors import UserError
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.report_cli import ReportArguments
from fastvideo.evaluation.report_compare import MOST_RUNS, write_comparison
from fastvideo.evaluation.report_run import read_runs

COMPARISON = Path("compare.html")


def run_report(arguments: ReportArguments) -> Path:
    """Write the page that the arguments ask for; an earlier page there is replaced.

    Raises:
        UserError: for no folder or too many, a folder that is no run, a damaged file, or an ``--out`` that is no page.
    """
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
