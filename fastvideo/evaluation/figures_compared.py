"""The figures of several runs in one table: like rows together, differences from the first, the best marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastvideo.evaluation.figures import (
    COLUMNS,
    Column,
    Metrics,
    difference,
    interval,
    measured_on,
    row_names,
    style_of,
    time_of,
    titles_of,
)
from fastvideo.evaluation.figures_table import (
    HEADS,
    counted_heads,
    estimate,
    floor_row,
    how,
    table,
    table_row,
)
from fastvideo.evaluation.report_run import Run

BEST = '<span class="best" title="best of its group">{}</span>'


@dataclass(frozen=True)
class Cell:
    """A row of a run in the comparison; ``shared`` if all runs of its group have the same figures there."""

    run: Run
    name: str
    title: str
    shared: bool = False

    @property
    def row(self) -> Metrics:
        """Its figures."""
        return dict(self.run.metrics[self.name])

    @property
    def style(self) -> str:
        """Its colour class."""
        return style_of(self.name, self.row)


@dataclass(frozen=True)
class Group:
    """Runs that were measured alike: same prompts, noise and reference videos."""

    runs: tuple[Run, ...]

    def sections(self) -> list[list[Cell]]:
        """Rows of one title together, in the order of the runs; figures that all runs share stand once."""
        found: dict[str, list[Cell]] = {}
        for run in self.runs:
            for name, title in titles_of(run.metrics).items():
                found.setdefault(title, []).append(Cell(run, name, title))
        return [self._merged(cells) for cells in found.values()]

    def _merged(self, cells: list[Cell]) -> list[Cell]:
        first = cells[0]
        same = all(_figures(cell.row) == _figures(first.row) for cell in cells)
        whole = len(cells) == len(self.runs) > 1
        return [Cell(first.run, first.name, first.title, shared=True)] if same and whole else cells

    def cells(self) -> list[Cell]:
        """All rows, section by section."""
        return [cell for section in self.sections() for cell in section]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The measured runs, those measured alike together, in order of appearance."""
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.metrics:
            found.setdefault(run.measurement, []).append(run)
    return [Group(tuple(members)) for members in found.values()]


def _figures(row: Metrics) -> tuple[object, ...]:
    return tuple(row[column.key] for column in COLUMNS)


def comparison_table(groups: Sequence[Group]) -> str:
    """All groups; where there are several, each under a line that says on what it was measured."""
    first = groups[0].runs[0].metrics
    heads = counted_heads(first[row_names(first)[0]], ["denoising"]) if len(groups) == 1 else list(HEADS[:-1])
    caption = (
        "Small print: 95 % bootstrap intervals over prompts; where every prompt came out right, how many there were. "
        "The best of each model is coloured. Differences are from the first run that has the model, in percentage "
        "points for accuracies; in bold type the interval leaves zero out. It is combined as for independent samples: "
        "a paired one would be narrower. Times are not compared: runs are measured at different moments."
    )
    return table("figures compared", "model", heads, [_group_rows(group, len(groups) > 1) for group in groups], caption)


def _group_rows(group: Group, named: bool) -> str:
    metrics = group.runs[0].metrics
    line = ""
    if named:
        text = f"Measured on {measured_on(metrics)}: {', '.join(run.name for run in group.runs)}"
        span = len(HEADS)
        line = f'<tr role="row" class="group"><th role="columnheader" colspan="{span}">{escape(text)}</th></tr>'
    rows = [_row(cell, section) + _difference_row(cell, section) for section in group.sections() for cell in section]
    return line + "".join(rows) + floor_row(metrics[row_names(metrics)[0]], blank=1)


def _row(cell: Cell, section: Sequence[Cell]) -> str:
    cells = [_calls(cell, section)]
    cells += [_figure(cell, section, column) for column in COLUMNS]
    cells.append(time_of(cell.row))
    who = "all runs" if cell.shared else escape(cell.run.name)
    title = f"{escape(cell.title)}<small>{who}; {how(cell.row)}</small>"
    style = f"{cell.style}{' group-first' if cell is section[0] else ''}"
    return table_row(style, title, HEADS[:-1], cells)


def _figure(cell: Cell, section: Sequence[Cell], column: Column) -> str:
    text = estimate(cell.row, column)
    if len(section) == 1:
        return text
    shown = [column.shown(other.row[column.key]) for other in section if other.row[column.key] is not None]
    best = min(shown, default=0.0) if column.lower_is_better else max(shown, default=0.0)
    value = cell.row[column.key]
    return _marked(text, value is not None and len(set(shown)) > 1 and column.shown(value) == best)


def _difference_row(cell: Cell, section: Sequence[Cell]) -> str:
    """A run's figures minus those of the first run that has the model."""
    if cell is section[0]:
        return ""
    cells = [_delta(cell.row, section[0].row, column) for column in COLUMNS]
    title = f"<small>{escape(cell.run.name)} minus {escape(section[0].run.name)}</small>"
    return table_row("difference", title, HEADS[:-1], ["", *cells, ""])


def _delta(row: Metrics, first: Metrics, column: Column) -> str:
    found = difference(row, first, column.key)
    if found is None:
        return ""
    if row[column.key] == first[column.key]:
        return "<small>the same</small>"
    value = f"<b>{column.text(found.value, True)}</b>" if found.sure else column.text(found.value, True)
    return f"{value}<small>{interval(column, found.low, found.high, True)}</small>"


def _marked(text: str, best: bool) -> str:
    """A figure, its value coloured if it is the best; the interval below stays as it is."""
    value, small, rest = text.partition("<small>")
    return BEST.format(value) + small + rest if best else text


def _calls(cell: Cell, section: Sequence[Cell]) -> str:
    calls = [other.row["network_calls"] for other in section]
    return _marked(str(cell.row["network_calls"]), len(set(calls)) > 1 and cell.row["network_calls"] == min(calls))
