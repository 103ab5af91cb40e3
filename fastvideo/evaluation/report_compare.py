"""The page that shows several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fastvideo.evaluation.charts import series_class
from fastvideo.evaluation.charts_cost import Mark, cost_chart
from fastvideo.evaluation.figures import FRECHET, difference, fact_list, interval, measured_on, of_kind, steps_of
from fastvideo.evaluation.figures_compared import Cell, comparison_table, groups_of
from fastvideo.evaluation.figures_table import table, table_row
from fastvideo.evaluation.report import FIGURES_LEAD
from fastvideo.evaluation.report_media import Column, gallery
from fastvideo.evaluation.report_page import Curves, Head, card, curve_sections, flattened, section, write_page
from fastvideo.evaluation.report_run import Run

MOST_RUNS = 12
"""More curves than this cannot be told apart."""
ABSENT = "\u2014"
UNLIKE = (
    "These runs were measured on different prompts, seeds or reference videos. Their figures stand in groups of their "
    "own and no difference is taken across groups: the distances depend on how many prompts there were."
)
VIDEOS_LEAD = (
    "The first held-out prompts of the evaluation, not chosen by eye. A model that is the same in all runs stands once."
)
OWN_KEYS = ("output",)
"""Config keys that differ between any two runs and say nothing."""


def write_comparison(path: Path, runs: Sequence[Run]) -> Path:
    """The page of several runs; those measured on other prompts are kept apart, and what is missing is said."""
    settings = [flattened(run.settings) for run in runs]
    sections = [
        _notices(runs),
        section("figures", "Figures", FIGURES_LEAD, _figures(runs)),
        section("videos", "The same prompts", VIDEOS_LEAD, _galleries(runs)),
        section("curves", "Training", "", curve_sections(overlaid(runs))),
        section("config", "What differs in the configs", "", _config_differences(runs, settings)),
        section(
            "environment", "What differs in the environments", "", _differences(runs, [r.environment for r in runs])
        ),
    ]
    return write_page(path, _head(runs), sections)


def _head(runs: Sequence[Run]) -> Head:
    recipes = sorted({run.recipe for run in runs if run.recipe})
    names = f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}"
    title = names if len(names) <= 40 else f"{len(runs)} runs side by side"
    groups = groups_of(runs)
    meta = f"{measured_on(groups[0].runs[0].metrics)} \u00b7 the same for every row" if len(groups) == 1 else ""
    lead = f"Figures, videos, curves and configs of {names}. What is the same in all of them stands once."
    return Head(title, ", ".join(recipes) or "fastvideo", lead, meta, _facts(runs))


def _facts(runs: Sequence[Run]) -> str:
    """Each run's student with the most calls."""
    items = []
    first = of_kind(runs[0].metrics, "student")
    for run in runs:
        students = of_kind(run.metrics, "student")
        if not students:
            continue
        note = f"Fréchet, {steps_of(students[0])}"
        if first and run is not runs[0] and run.measurement == runs[0].measurement:
            found = difference(students[0], first[0], "frechet")
            assert found is not None, "a Frechet distance is always defined"
            note += f"; {FRECHET.text(found.value, True)} ({interval(FRECHET, found.low, found.high, True)})"
        items.append((run.name, FRECHET.text(students[0]["frechet"]), note))
    return fact_list(items)


def _notices(runs: Sequence[Run]) -> str:
    """What cannot be compared, and why."""
    missing = {
        "not measured, so there are only curves and config": [run.name for run in runs if not run.metrics],
        "no videos kept": [run.name for run in runs if run.metrics and run.gallery is None],
        "no training curves": [run.name for run in runs if not run.curves],
        "no config": [run.name for run in runs if not run.config],
    }
    texts = [f"{', '.join(names)}: {what}." for what, names in missing.items() if names]
    if len(groups_of(runs)) > 1:
        texts.insert(0, UNLIKE)
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in texts)


def _figures(runs: Sequence[Run]) -> str:
    groups = groups_of(runs)
    if not groups:
        return ""
    return (_cost(runs) if len(groups) == 1 else "") + card(comparison_table(groups))


def _cost(runs: Sequence[Run]) -> str:
    """All rows of all runs; what is the same in all of them once, in the teacher's colour."""
    marks = []
    cells = groups_of(runs)[0].cells()
    for cell in cells:
        low, high = cell.row["intervals"]["frechet"]
        style = "teacher" if cell.shared else series_class(runs.index(cell.run))
        meaning = "the same in all runs" if cell.shared else cell.run.name
        marks.append(
            Mark(steps_of(cell.row), cell.row["network_calls"], cell.row["frechet"], low, high, style, meaning)
        )
    return card(cost_chart(marks, cells[0].row["frechet_floor"], "Fréchet distance"))


def _galleries(runs: Sequence[Run]) -> str:
    """One gallery over the prompts that all runs with videos share, place by place."""
    kept = [run.gallery.prompts for run in runs if run.gallery is not None]
    if not kept:
        return ""
    places = [place for place, prompts in enumerate(zip(*kept, strict=False)) if len(set(prompts)) == 1]
    if not places:
        return '<p class="notice">The videos that these runs kept have no prompt in common.</p>'
    cells = [cell for group in groups_of(runs) for cell in group.cells()]
    columns = [column for cell in cells if (column := _column(cell, places)) is not None]
    return card(gallery([kept[0][place] for place in places], columns))


def _column(cell: Cell, places: Sequence[int]) -> Column | None:
    if cell.run.gallery is None or cell.name not in cell.run.gallery.rows:
        return None
    clips = cell.run.gallery.rows[cell.name]
    title = cell.title if cell.shared else f"{cell.title}: {cell.run.name}"
    return Column(title, cell.style, [clips[place] for place in places])


def overlaid(runs: Sequence[Run]) -> Curves:
    """Every metric that was logged, with a curve per run; a run that did not log it keeps its place, empty."""
    names = sorted({name for run in runs for name in run.curves})
    return {name: {run.name: run.curves.get(name, ()) for run in runs} for name in names}


def _config_differences(runs: Sequence[Run], settings: Sequence[Mapping[str, str]]) -> str:
    kept = [{key: value for key, value in values.items() if key not in OWN_KEYS} for values in settings]
    if sum(bool(values) for values in kept) < 2:
        return ""
    return _differences(runs, kept) or "<p>Nothing but the output folder.</p>"


def _differences(runs: Sequence[Run], values: Sequence[Mapping[str, str]]) -> str:
    """The keys whose values are not the same in all runs that have any."""
    present = [(run, found) for run, found in zip(runs, values, strict=True) if found]
    keys = dict.fromkeys(key for _, found in present for key in found)
    unlike = [key for key in keys if len({found.get(key) for _, found in present}) > 1]
    heads = [escape(run.name) for run, _ in present]
    names = [run.name for run, _ in present]
    rows = [
        table_row("", escape(key), names, [escape(found.get(key, ABSENT)) for _, found in present]) for key in unlike
    ]
    return card(table("differences", "key", heads, ["".join(rows)], "")) if rows else ""
