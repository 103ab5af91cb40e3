"""The page of one run or of several side by side: one HTML file without script or external resource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastvideo.errors import UserError
from fastvideo.evaluation import figures as figure
from fastvideo.evaluation.catalogue import FRECHET, LAST_FRECHET, distance_of
from fastvideo.evaluation.charts import cost_chart
from fastvideo.evaluation.figures import Entry, Group, distance_name, groups_of
from fastvideo.evaluation.report_media import ModelVideos, PromptGrid, gallery, validation_strips
from fastvideo.evaluation.report_run import Run, read_runs
from fastvideo.evaluation.report_streams import frame_strips, stream_charts
from fastvideo.evaluation.report_training import alarm_list, chart_groups, curves_of, health_table, once_table
from fastvideo.evaluation.tables import Cell, Line, Table
from fastvideo.files import replace_file
from fastvideo.mount import check_writable

MOST_RUNS = 12
"""More curves than this cannot be told apart."""
COMPARISON = Path("compare.html")
ABSENT = "\u2014"
OWN_KEYS = ("output",)
"""Config keys that differ between any two runs."""


class Masthead(NamedTuple):
    """The top of a page."""

    title: str
    eyebrow: str
    lead: str
    meta: str = ""
    facts: Sequence[tuple[str, str, str]] = ()


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of run folders; an earlier page there is replaced, whole or not at all.

    Args:
        runs: folders as `fastvideo distill`, `fastvideo evaluate` and the demo leave them.
        output: the page; by default ``RUN/report.html`` for one run, ``compare.html`` for several.

    Raises:
        UserError: for no folder or too many, a folder that is not a run, a damaged file, or an invalid ``output``.
    """
    if not runs:
        raise UserError("report: give one or several run folders")
    if len(runs) > MOST_RUNS:
        raise UserError(f"report: at most {MOST_RUNS} runs can be told apart on one page, got {len(runs)}")
    path = output or (runs[0] / "report.html" if len(runs) == 1 else COMPARISON)
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"--out {path}: the name of a page, ending in .html, is expected")
    check_writable(path, "page" if output is None else "--out")
    page = render(read_runs(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def render(runs: Sequence[Run]) -> str:
    alone, groups = len(runs) == 1, groups_of(runs)
    charts, more = chart_groups(curves_of(runs))
    template = _environment().get_template("page.html.j2")
    return template.render(
        head=_masthead_of_one(runs[0]) if alone else _masthead_of_several(runs, groups),
        runs=runs,
        groups=groups,
        alone=alone,
        missing=_missing(runs),
        differences=[] if alone else differences(runs),
        gallery=_gallery(runs, groups),
        validations=validation_strips(runs),
        worth=figure.verdicts(runs[0].metrics) if alone else None,
        figures=figure.figures_tables(groups, not alone),
        streams=stream_charts(groups, alone),
        frames=frame_strips(groups, alone),
        cost=_cost(runs, groups[0]) if len(groups) == 1 else None,
        alarms=alarm_list(runs),
        health=health_table(runs),
        charts=charts,
        more=more,
        once=once_table(runs),
        details=_details(runs[0]) if alone else {},
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fastvideo.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _masthead_of_one(run: Run) -> Masthead:
    eyebrow = run.recipe or "fastvideo"
    if not run.metrics:
        return Masthead(run.name, eyebrow, "Trained, not measured yet. This adds figures and videos:")
    meta = f"{figure.measured_on(run.metrics)} \u00b7 the same for every row \u00b7 95 % intervals"
    return Masthead(figure.headline(run.metrics), eyebrow, figure.lead(run.metrics), meta, figure.facts(run.metrics))


def _masthead_of_several(runs: Sequence[Run], groups: Sequence[Group]) -> Masthead:
    recipes = sorted({run.recipe for run in runs if run.recipe})
    names = f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}"
    title = names if len(names) <= 40 else f"{len(runs)} runs side by side"
    meta = f"{figure.measured_on(groups[0].metrics)} \u00b7 the same for every row" if len(groups) == 1 else ""
    lead = f"Configs, figures, videos and curves of {names}. What is the same in all of them appears once."
    return Masthead(title, ", ".join(recipes) or "fastvideo", lead, meta, figure.facts_of_runs(runs))


def _missing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Names of the runs that lack something, by the page's text about it."""
    unmeasured = [run for run in runs if not run.metrics]
    missing = {
        "not measured, so there are only curves and config": [r.name for r in unmeasured if not r.validation],
        "not measured, so its videos are those of its last validation": [r.name for r in unmeasured if r.validation],
        "no videos kept": [run.name for run in runs if run.metrics and run.gallery is None],
        "no training curves": [run.name for run in runs if not run.curves],
        "no config": [run.name for run in runs if not run.config],
    }
    return {text: names for text, names in missing.items() if names}


def _cost(runs: Sequence[Run], group: Group) -> str | None:
    distance = distance_of(group.first)
    if not distance.floor:
        return None
    real = distance in (FRECHET, LAST_FRECHET)
    label = distance_name(distance)
    note = "a perfect model (floor)" if real else "the teacher, from itself (floor)"
    return cost_chart(figure.marks(group, runs), group.first[distance.floor], label, note)


def _gallery(runs: Sequence[Run], groups: Sequence[Group]) -> PromptGrid | None:
    """One gallery over the prompts that all runs with videos share, place by place."""
    kept = [run.gallery.prompts for run in runs if run.gallery is not None]
    places = [place for place, prompts in enumerate(zip(*kept, strict=False)) if len(set(prompts)) == 1]
    found = [_model_videos(entry, places, len(runs) == 1) for group in groups for entry in group.entries()]
    models = [one for one in found if one is not None]
    return gallery([kept[0][place] for place in places], models) if models and places else None


def _model_videos(entry: Entry, places: Sequence[int], alone: bool) -> ModelVideos | None:
    if entry.run.gallery is None or entry.name not in entry.run.gallery.rows:
        return None
    files = entry.run.gallery.rows[entry.name]
    title = entry.title if entry.shared or alone else f"{entry.title}: {entry.run.name}"
    return ModelVideos(title, entry.style, [files[place] for place in places])


def differences(runs: Sequence[Run]) -> list[tuple[str, str, Table | None]]:
    """Section name, title and table of differing config keys and versions; a table is ``None`` if nothing differs."""
    configs = [{k: v for k, v in flattened(run.settings).items() if k not in OWN_KEYS} for run in runs]
    found = []
    if sum(map(bool, configs)) > 1:
        found.append(("config", "What differs in the configs", _differing(runs, configs)))
    if environments := _differing(runs, [run.environment for run in runs]):
        found.append(("environment", "What differs in the environments", environments))
    return found


def _differing(runs: Sequence[Run], values: Sequence[Mapping[str, str]]) -> Table | None:
    """Table of the keys with different values among the runs that have any; ``None`` without one."""
    present = [(run, found) for run, found in zip(runs, values, strict=True) if found]
    keys = dict.fromkeys(key for _, found in present for key in found)
    unlike = [key for key in keys if len({found.get(key) for _, found in present}) > 1]
    heads = [Cell("key"), *(Cell(run.name) for run, _ in present)]
    lines = [Line(Cell(key), [Cell(str(found.get(key, ABSENT))) for _, found in present]) for key in unlike]
    return Table("differences", heads, [lines]) if lines else None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as dotted ones, values as YAML on one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    return flat


def _details(run: Run) -> dict[str, Mapping[str, object]]:
    groups: dict[str, Mapping[str, object]] = {
        "Evaluation": run.metrics.get("evaluation", {}),
        "Distillation": run.metrics.get("distillation", {}),
        "Environment of the training": run.environment,
    }
    return {title: values for title, values in groups.items() if values}
