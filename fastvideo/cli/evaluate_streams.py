"""``fastvideo evaluate --long``: streams of a causal model, their drift, seams, switches and exposure bias."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fastvideo.cli.evaluate import EvaluateArguments, row_specs, shown, world_prompts, write_out
from fastvideo.errors import UserError
from fastvideo.sampling_ranges import ON_SWITCH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastvideo.evaluation.statistics import Estimate
    from fastvideo.evaluation.streams.measure import StreamRow
    from fastvideo.evaluation.streams.series import Series

KEPT_STREAMS = 4
"""Streams per model that a folder keeps: they are long."""
MOST_WINDOWS = 5
"""Windows of a model in the table; figures and page have all."""
DRIFT = {"digit": 3, "colour": 3, "direction": 3, "frechet": 1, "speed": 2, "turn": 0, "frozen": 2, "identity": 2}
"""Curves of the drift table, with their digits."""
FIGURES = {
    "ink_slope": ("brightness\n/ 100 frames", 3),
    "saturation_slope": ("saturation\n/ 100 frames", 3),
    "seam_acceleration": ("seams:\njerk", 2),
    "seam_jump_pixels": ("seams:\npixels", 2),
    "frechet_bias_last": ("own past:\nFrechet", 1),
    "digit_bias_last": ("own past:\ndigit", 3),
    "colour_bias_last": ("own past:\ncolour", 3),
    "direction_bias_last": ("own past:\ndirection", 3),
}
SWITCHES = {
    "switch_median": ("median", 0),
    "switch_p90": ("90 %", 0),
    "switch_never": ("never", 3),
    "kept_before": ("kept\nbefore", 3),
    "kept_during": ("kept\nbehind it", 3),
    "kept_after": ("kept at\nthe end", 3),
    "continuous": ("continuous", 3),
}


def run_streams(arguments: EvaluateArguments, console: Console) -> None:
    """Measure streams of the folders, print the tables and write ``arguments.out``.

    Raises:
        UserError: for a bad folder, sampler or length, or an ``out`` that holds figures, before anything is sampled.
    """
    from fastvideo.evaluation.report_store import check_unmeasured
    from fastvideo.evaluation.streams.measure import StreamTask, measure_streams
    from fastvideo.evaluation.streams.world import StreamJudge
    from fastvideo.inference.sampler import BATCH_SIZE

    assert arguments.long is not None
    if arguments.switches == 1:
        raise UserError("--switches: at least 2 are expected, which have a spread")
    if arguments.on_switch != ON_SWITCH and not arguments.switches:
        raise UserError(f"--on-switch {arguments.on_switch}: no prompt changes: add --switches, such as --switches 64")
    rows = row_specs(arguments.folders, arguments.guidance, arguments.ladder)
    whole = arguments.out is not None and arguments.out.suffix != ".json"
    if arguments.out is not None and whole:
        check_unmeasured(arguments.out)
    task = StreamTask(
        StreamJudge(world_prompts(arguments), arguments.seed, arguments.long),
        arguments.switches,
        arguments.on_switch,
        arguments.batch_size or BATCH_SIZE,
        KEPT_STREAMS if whole else 1,
        arguments.device,
    )
    evaluation = measure_streams(rows, task)
    for one in tables(evaluation.rows, task.judge.frames, task.switches, task.on_switch):
        console.print(one)
    if arguments.out is not None:
        console.print(write_out(arguments.out, evaluation), highlight=False)


def tables(rows: Mapping[str, StreamRow], frames: int, switches: int, on_switch: str) -> Iterator[Table]:
    """Drift, figures of whole streams, and switches."""
    count = next(iter(rows.values())).samples
    yield _drift(rows, f"Drift: {count} streams of {frames} frames, 95 % bootstrap intervals")
    yield _figures(rows, FIGURES, "Whole streams")
    if switches:
        yield _figures(rows, SWITCHES, f"{switches} prompt switches ({on_switch}): frames until the new prompt shows")


def _drift(rows: Mapping[str, StreamRow], title: str) -> Table:
    """A line per model and window, real streams last."""
    from rich.table import Table

    out = Table(title=title, caption="real: the prompts' real streams through the VAE, a perfect model")
    out.add_column("model", overflow="fold")
    for heading in ("frames", *DRIFT):
        out.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        _add_windows(out, name, row.series)
    last = list(rows.values())[-1].series
    _add_windows(out, "real", {name: last[f"real_{name}"] for name in DRIFT}, ends=True)
    return out


def _add_windows(out: Table, title: str, series: Mapping[str, Series], ends: bool = False) -> None:
    from fastvideo.tiny.classifier import FRAMES

    starts = series["digit"].at
    for number, place in enumerate((0, len(starts) - 1) if ends else spread(len(starts), MOST_WINDOWS)):
        figures = (cell(series[name][place], digits) for name, digits in DRIFT.items())
        out.add_row("" if number else title, f"{starts[place] + 1}-{starts[place] + FRAMES}", *figures)
    out.add_section()


def spread(count: int, most: int) -> Sequence[int]:
    """Up to ``most`` places of ``count``, evenly spaced, the first and the last among them."""
    if count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _figures(rows: Mapping[str, StreamRow], columns: Mapping[str, tuple[str, int]], title: str) -> Table:
    """A line per model with its figures."""
    from rich.table import Table

    out = Table(title=title, min_width=min(len(title) + 4, 78))
    out.add_column("model", overflow="fold")
    out.add_column("calls\n/ chunk", justify="right")
    for heading, _ in columns.values():
        out.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = (cell(row.figures.get(key), digits) for key, (_, digits) in columns.items())
        out.add_row(name, str(row.network_calls), *cells)
    return out


def cell(figure: Estimate | float | None, digits: int) -> str:
    """A figure with its interval; nothing for an undefined one, and an infinite number of frames is "never"."""
    if figure is None or isinstance(figure, float) or math.isnan(figure.value):
        return ""
    return shown(figure, digits).replace("inf-inf", "").replace("inf", "never")
