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
from fastvideo.evaluation.charts import cost_chart
from fastvideo.evaluation.figures import Cell, Entry, Group, Line, Table, groups_of
from fastvideo.evaluation.report_media import ModelVideos, Shown, gallery, validation_strips
from fastvideo.evaluation.report_run import Run, read_runs
from fastvideo.evaluation.report_training import alarm_list, chart_groups, curves_of, health_table, once_table
from fastvideo.files import replace_file

MOST_RUNS = 12
"""More curves than this cannot be told apart."""
COMPARISON = Path("compare.html")
ABSENT = "\u2014"
OWN_KEYS = ("output",)
"""Config keys that differ between any two runs."""
TEXTS = {
    "figures": "Lower is better for both distances, higher for the rest. Accuracy counts only prompts that name the "
    "attribute, read back by a small frozen classifier that saw real videos alone. The Fréchet distance compares its "
    "features with those of held-out real videos; the pixel distance does the same with principal components of plain "
    "pixels, independent of any network. The floor is what as many real videos score after the VAE. Diversity is the "
    "spread between videos of one prompt, relative to real videos that fit it (1 = as varied as the world).",
    "videos": "The first held-out prompts of the evaluation, not chosen by eye. Every row of pictures starts from one "
    "noise.",
    "worth": "Each student against what one could use in its place: its teacher as good as it gets, its teacher "
    "hurried to as few steps, and the same sampler before any training.",
    "health": "Alarms of the validations during training, which compare the student's videos with the teacher's of "
    "the same prompts (or with real ones).",
}
SHARED_ONCE = " A model that is the same in all runs appears once."
NO_VIDEOS = "This run kept no videos: its folder has figures, but no videos folder."
UNMEASURED = "Trained, not measured yet. This adds figures and videos:"
MEASURE = "fastvideo evaluate {folder}/student --out {folder}"
UNLIKE = (
    "These runs were measured on different prompts, seeds or reference videos. Their figures stand in groups of their "
    "own and no difference is taken across groups: the distances depend on how many prompts there were."
)
NO_COMMON_PROMPT = "The videos that these runs kept have no prompt in common."


class Head(NamedTuple):
    """The top of a page."""

    title: str
    eyebrow: str
    lead: str
    meta: str
    facts: Sequence[tuple[str, str, str]] = ()
    command: str = ""


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of run folders; an earlier page there is replaced, whole or not at all.

    Args:
        runs: folders as `fastvideo distill`, `fastvideo evaluate` and the demo leave them.
        output: the page; by default ``RUN/report.html`` for one run, ``compare.html`` for several.

    Raises:
        UserError: for no folder or too many, a folder that is no run, a damaged file, or an ``output`` that is no page.
    """
    if not runs:
        raise UserError("report: give one or several run folders")
    if len(runs) > MOST_RUNS:
        raise UserError(f"report: at most {MOST_RUNS} runs can be told apart on one page, got {len(runs)}")
    path = output or (runs[0] / "report.html" if len(runs) == 1 else COMPARISON)
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"--out {path}: the name of a page, ending in .html, is expected")
    page = render(read_runs(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def render(runs: Sequence[Run]) -> str:
    """The HTML of the page."""
    alone, groups = len(runs) == 1, groups_of(runs)
    charts, more = chart_groups(curves_of(runs))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            head=_head_of_one(runs[0]) if alone else _head_of_several(runs, groups),
            notices=notices(runs, groups),
            texts=TEXTS if alone else TEXTS | {"videos": TEXTS["videos"] + SHARED_ONCE},
            differences=[] if alone else differences(runs),
            videos=_videos(runs, groups),
            worth=figure.verdicts(runs[0].metrics) if alone else None,
            figures=figure.figures_table(groups, not alone) if groups else None,
            cost=_cost(runs, groups[0]) if len(groups) == 1 else None,
            alarms=alarm_list(runs),
            health=health_table(runs),
            charts=charts,
            more=more,
            once=once_table(runs),
            details=_details(runs[0]) if alone else {},
            config=runs[0].config if alone else "",
            config_open=alone and not runs[0].metrics and not runs[0].curves,
        )
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


def _head_of_one(run: Run) -> Head:
    eyebrow = run.recipe or "fastvideo"
    if not run.metrics:
        return Head(run.name, eyebrow, UNMEASURED, "", command=MEASURE.format(folder=run.folder))
    meta = f"{figure.measured_on(run.metrics)} \u00b7 the same for every row \u00b7 95 % intervals"
    return Head(figure.headline(run.metrics), eyebrow, figure.lead(run.metrics), meta, figure.facts(run.metrics))


def _head_of_several(runs: Sequence[Run], groups: Sequence[Group]) -> Head:
    recipes = sorted({run.recipe for run in runs if run.recipe})
    names = f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}"
    title = names if len(names) <= 40 else f"{len(runs)} runs side by side"
    meta = f"{figure.measured_on(groups[0].metrics)} \u00b7 the same for every row" if len(groups) == 1 else ""
    lead = f"Configs, figures, videos and curves of {names}. What is the same in all of them appears once."
    return Head(title, ", ".join(recipes) or "fastvideo", lead, meta, figure.facts_of_runs(runs))


def notices(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """Missing parts of the runs, and figures that cannot be compared."""
    if len(runs) == 1:
        return [] if runs[0].curves or runs[0].metrics else ["No metrics were logged in this run."]
    unmeasured = [run for run in runs if not run.metrics]
    missing = {
        "not measured, so there are only curves and config": [r.name for r in unmeasured if not r.validation],
        "not measured, so its videos are those of its last validation": [r.name for r in unmeasured if r.validation],
        "no videos kept": [run.name for run in runs if run.metrics and run.gallery is None],
        "no training curves": [run.name for run in runs if not run.curves],
        "no config": [run.name for run in runs if not run.config],
    }
    texts = [f"{', '.join(names)}: {what}." for what, names in missing.items() if names]
    return [UNLIKE, *texts] if len(groups) > 1 else texts


def _cost(runs: Sequence[Run], group: Group) -> str:
    return cost_chart(figure.marks(group, runs), group.first["frechet_floor"], "Fréchet distance")


def _videos(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """Videos of the evaluations, those of the validations for runs without, and a notice where there are none."""
    shown, notice = _gallery(runs, groups), ""
    if not shown and any(run.gallery for run in runs):
        notice = NO_COMMON_PROMPT
    elif len(runs) == 1 and runs[0].metrics and not shown:
        notice = NO_VIDEOS
    return {"gallery": shown, "validations": validation_strips(runs), "notice": notice}


def _gallery(runs: Sequence[Run], groups: Sequence[Group]) -> Shown | None:
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
    """The keys whose values are not the same in all runs that have any."""
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
