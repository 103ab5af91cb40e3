"""Tables of figures that read on a phone too: there every row becomes a block with its headings inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fastvideo.evaluation.figures import (
    COLUMNS,
    FRECHET,
    Column,
    Metrics,
    difference,
    interval,
    kind_of,
    of_kind,
    row_names,
    style_of,
    time_of,
    titles_of,
)

VERDICT_HEADS = ("calls", "Fréchet", "difference", "the student is")
HEADS = ("calls", *(column.head for column in COLUMNS), "denoising", "end to end")


def table(kind: str, first: str, heads: Sequence[str], bodies: Iterable[str], caption: str) -> str:
    """A table with explicit roles: on a phone its style changes what browsers would otherwise derive from tags.

    Args:
        kind: its class.
        first: heading of the first column.
        heads: the other headings, HTML.
        bodies: each the rows of one group.
        caption: HTML below the table.
    """
    names = "".join(f'<th role="columnheader" scope="col">{head}</th>' for head in (escape(first), *heads))
    groups = "".join(f'<tbody role="rowgroup">{rows}</tbody>' for rows in bodies)
    head = f'<thead role="rowgroup"><tr role="row">{names}</tr></thead>'
    note = f"<caption>{caption}</caption>" if caption else ""
    return f'<table class="stack {kind}" role="table">{note}{head}{groups}</table>'


def table_row(style: str, title: str, heads: Sequence[str], cells: Sequence[str]) -> str:
    """One row; ``title`` and ``cells`` are HTML. ``heads`` names the cells on a phone."""
    body = "".join(
        f'<td role="cell" data-label="{escape(head)}">{cell}</td>' for head, cell in zip(heads, cells, strict=True)
    )
    return f'<tr role="row" class="{style}"><th role="rowheader" scope="row">{title}</th>{body}</tr>'


def figures_table(metrics: Metrics) -> str:
    """All rows with intervals, sample counts and the floors."""
    names = row_names(metrics)
    first = metrics[names[0]]
    rows = [_figures_row(style_of(n, metrics[n]), title, metrics[n]) for n, title in titles_of(metrics).items()]
    caption = (
        "Small print: 95 % bootstrap intervals over prompts; where every prompt came out right, how many there were. "
        f"Time per video at batch size {first['batch_size']}, median over batches; end to end adds text encoding and "
        "VAE."
    )
    body = "".join(rows) + floor_row(first)
    return table("figures", "model", counted_heads(first), [body], caption)


def counted_heads(row: Metrics, last: Sequence[str] = ("denoising", "end to end")) -> list[str]:
    """The headings, each with the number of prompts behind it."""
    heads = [f"{column.head}<small>n = {row['counts'][column.key]}</small>" for column in COLUMNS]
    return ["calls", *heads, *last]


def floor_row(row: Metrics, blank: int = 2) -> str:
    """What real videos score, with ``blank`` empty cells at the end."""
    cells = [""] * (len(COLUMNS) + 1 + blank)
    for key, floor in (("frechet", "frechet_floor"), ("frechet_pixel", "frechet_pixel_floor")):
        index = next(i for i, column in enumerate(COLUMNS) if column.key == key)
        cells[index + 1] = COLUMNS[index].text(row[floor])
    title = "Real videos through the VAE<small>floor: a perfect model, same sample size</small>"
    return table_row("floor-row", title, HEADS[: len(cells)], cells)


def estimate(row: Metrics, column: Column) -> str:
    """A figure with its interval below it."""
    value, (low, high), count = row[column.key], row["intervals"][column.key], row["counts"][column.key]
    if value is None:
        return "n/a"
    all_right = column.percent and value == low == high == 1.0
    return f"{column.text(value)}<small>{f'{count} of {count}' if all_right else interval(column, low, high)}</small>"


def how(row: Metrics) -> str:
    """How a row was sampled."""
    guidance = "no guidance" if row["guidance"] == 1.0 else f"guidance {row['guidance']:g}"
    return f"{guidance}, {escape(row['sampler'])}"


def _figures_row(style: str, title: str, row: Metrics) -> str:
    cells = [str(row["network_calls"]), *(estimate(row, column) for column in COLUMNS)]
    times = [time_of(row), time_of(row, "end_to_end_seconds_per_video")]
    return table_row(style, f"{escape(title)}<small>{how(row)}</small>", HEADS, [*cells, *times])


def verdicts(metrics: Metrics) -> str:
    """Each student against what one would use instead of it; empty if there is nothing to compare with."""
    bodies = [_verdict_group(metrics, name) for name in row_names(metrics) if _alternatives(metrics, name)]
    caption = (
        "Difference: student minus the other, with a 95 % interval combined from both. Rows share prompts and noise, "
        "so a paired interval would be narrower."
    )
    return table("verdicts", "model", VERDICT_HEADS, bodies, caption) if bodies else ""


def _alternatives(metrics: Metrics, student: str) -> list[str]:
    """For a student: the teacher with the most steps, and what else takes as many steps as the student."""
    if kind_of(student, metrics[student]) != "student":
        return []
    most = max((row["network_calls"] for row in of_kind(metrics, "teacher")), default=0)
    return [
        name
        for name in row_names(metrics)
        if (kind := kind_of(name, metrics[name])) in ("teacher", "untrained")
        and (
            metrics[name]["steps"] == metrics[student]["steps"]
            or (kind == "teacher" and metrics[name]["network_calls"] == most)
        )
    ]


def _verdict_group(metrics: Metrics, name: str) -> str:
    """The student's own line, then one line per alternative."""
    titles, student = titles_of(metrics), metrics[name]
    own = [str(student["network_calls"]), estimate(student, FRECHET), "", ""]
    rows = [_verdict(student, titles[other], metrics[other]) for other in _alternatives(metrics, name)]
    return table_row("student", escape(titles[name]), VERDICT_HEADS, own) + "".join(rows)


def _verdict(student: Metrics, title: str, other: Metrics) -> str:
    found = difference(student, other, "frechet")
    assert found is not None, "a Frechet distance is always defined"
    word = "not told apart" if not found.sure else "closer to real videos" if found.value < 0 else "further away"
    delta = f"{FRECHET.text(found.value, True)}<small>{interval(FRECHET, found.low, found.high, True)}</small>"
    verdict = f'<span class="verdict {"sure" if found.sure else "open"}">{word}</span>'
    cells = [str(other["network_calls"]), estimate(other, FRECHET), delta, verdict]
    return table_row("", f"<span>instead of</span> {escape(title)}", VERDICT_HEADS, cells)
