"""The page of one run: one HTML file that holds everything it shows, so that it can be mailed and opened anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastvideo.evaluation.charts import Point
from fastvideo.evaluation.charts_cost import cost_chart
from fastvideo.evaluation.figures import (
    facts,
    headline,
    lead,
    marks,
    measured_on,
    row_names,
    style_of,
    titles_of,
)
from fastvideo.evaluation.figures_table import figures_table, verdicts
from fastvideo.evaluation.report_media import Column, gallery
from fastvideo.evaluation.report_page import (
    Curves,
    Head,
    card,
    curve_sections,
    fold,
    pre,
    section,
    settings_list,
    write_page,
)
from fastvideo.evaluation.report_run import Run

FIGURES_LEAD = (
    "Lower is better for both distances, higher for the rest. Accuracy counts only prompts that name the attribute, "
    "read back by a small frozen classifier that saw real videos alone. The Fréchet distance compares its features "
    "with those of held-out real videos; the pixel distance does the same with principal components of plain pixels, "
    "independent of any network. The floor is what as many real videos score after the VAE. Diversity is the spread "
    "between videos of one prompt, relative to real videos that fit it (1 = as varied as the world)."
)
VIDEOS_LEAD = (
    "The first held-out prompts of the evaluation, not chosen by eye. Every row of pictures starts from one noise."
)
WORTH_LEAD = (
    "Each student against what one could use in its place: its teacher as good as it gets, its teacher hurried to as "
    "few steps, and the same sampler before any training."
)
HEALTH_LEAD = "What the validations of the training raised, compared with the teacher's videos of the same prompts."
NO_VIDEOS = "This run kept no videos: its folder has figures, but no videos folder."
UNMEASURED = "Trained, not measured yet: `fastvideo evaluate {folder}/student --out {folder}` adds figures and videos."


def write_report(path: Path, run: Run) -> Path:
    """The page of one run, with whatever its folder holds."""
    metrics = run.metrics
    sections = [
        section("videos", "Same prompts, same noise", VIDEOS_LEAD, run_gallery(run)) if metrics else "",
        section("worth", "Was it worth it?", WORTH_LEAD, card(verdicts(metrics))),
        section("figures", "Figures", FIGURES_LEAD, _figures(run)) if metrics else "",
        section("health", "Health", HEALTH_LEAD, health_list(run)),
        section("curves", "Training", "", curve_sections(run_curves(run))),
        section("details", "How it was made", "", _details(run)),
    ]
    return write_page(path, _head(run), sections)


def _head(run: Run) -> Head:
    eyebrow = run.recipe or "fastvideo"
    if not run.metrics:
        return Head(run.name, eyebrow, UNMEASURED.format(folder=run.folder), "")
    meta = f"{measured_on(run.metrics)} \u00b7 the same for every row \u00b7 95 % intervals"
    return Head(headline(run.metrics), eyebrow, lead(run.metrics), meta, facts(run.metrics))


def run_gallery(run: Run) -> str:
    """The kept videos, or a line that says that there are none."""
    if run.gallery is None:
        return f'<p class="notice">{NO_VIDEOS}</p>'
    kept = {name: title for name, title in titles_of(run.metrics).items() if name in run.gallery.rows}
    columns = [Column(title, style_of(n, run.metrics[n]), run.gallery.rows[n]) for n, title in kept.items()]
    return card(gallery(run.gallery.prompts, columns))


def health_list(run: Run) -> str:
    """The alarms, each with the steps at which it was raised, in the words of the last; nothing without validations."""
    if not run.health:
        return ""
    raised: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for line in run.health:
        for alarm in line["alarms"]:
            raised.setdefault(alarm["name"], []).append(line["step"])
            texts[alarm["name"]] = alarm["text"]
    if not raised:
        return card(f"<p>No alarm in {len(run.health)} validations.</p>")
    items = {f"{name}, at step {', '.join(map(str, steps))}": texts[name] for name, steps in raised.items()}
    return card(settings_list(items))


def run_curves(run: Run) -> Curves:
    """Curves by metric; ``validation/NETWORK/METRIC`` of several networks share one chart."""
    charts: dict[str, dict[str, list[Point]]] = {}
    for name, points in sorted(run.curves.items()):
        parts = name.split("/")
        shared = parts[0] == "validation" and len(parts) == 3
        title, series = (f"validation/{parts[2]}", parts[1]) if shared else (name, "")
        charts.setdefault(title, {})[series] = list(points)
    return charts


def _figures(run: Run) -> str:
    first = run.metrics[row_names(run.metrics)[0]]
    chart = cost_chart(marks(run.metrics), first["frechet_floor"], "Fréchet distance")
    return card(chart) + card(figures_table(run.metrics))


def _details(run: Run) -> str:
    groups: dict[str, Mapping[str, object]] = {
        "Evaluation": run.metrics.get("evaluation", {}),
        "Distillation": run.metrics.get("distillation", {}),
        "Environment of the training": run.environment,
    }
    parts = [fold(title, settings_list(values)) for title, values in groups.items() if values]
    if run.config:
        parts.append(fold("Resolved config", pre(run.config)))
    return "".join(parts)
