"""The report: one HTML file that holds everything it shows, so that it can be mailed and opened anywhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml
from torch import Tensor

from fastvideo.data.video_io import FORMATS, video_bytes
from fastvideo.evaluation.charts import cost_chart, grouped, line_chart, read_curves
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.figures import facts, figures_table, headline, lead, marks, row_names, title_of

TINY = 128
"""Pixels of height up to which videos are embedded losslessly and enlarged by the browser."""


FIGURES_LEAD = (
    "Lower is better for both distances, higher for the rest. Accuracy counts only prompts that name the attribute, "
    "read back by a small frozen classifier that saw real videos alone. The Fréchet distance compares its features "
    "with those of held-out real videos; the pixel distance does the same with principal components of plain pixels, "
    "independent of any network. The floor is what as many real videos score after the VAE. Diversity is the spread "
    "between videos of one prompt, relative to real videos that fit it (1 = as varied as the world)."
)


@dataclass(frozen=True)
class ReportData:
    """What the page shows.

    Attributes:
        metrics: the object in ``metrics.json``.
        videos: by row name, ``[V, 3, T, H, W]`` in ``[-1, 1]`` for the same ``prompts``.
        prompts: ``V`` texts or more.
        curves: ``metrics.jsonl`` files by title.
        configs: YAML texts by title.
        environment: versions and machine.
        eyebrow: the small line above the title.
        fps: frames per second of the videos.
    """

    metrics: Mapping[str, Any]
    videos: Mapping[str, Tensor]
    prompts: Sequence[str]
    curves: Mapping[str, Path] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    eyebrow: str = "fastvideo"
    fps: int = 8


def write_report(path: Path, evaluation: Evaluation, *, run: Path, figures: Mapping[str, Any]) -> Path:
    """The page of one run: its evaluation, and what lies in its folder.

    Args:
        path: the page.
        evaluation: where the videos come from.
        run: the run's folder, with ``config.yaml``, ``metrics.jsonl`` and ``environment.json`` as far as they exist.
        figures: the object in ``metrics.json``.
    """
    config, curves, environment = run / "config.yaml", run / "metrics.jsonl", run / "environment.json"
    resolved = config.read_text(encoding="utf-8") if config.is_file() else ""
    values = yaml.safe_load(resolved) or {}
    names = [str(values[key]).upper() for key in ("distill_method", "distill_model") if key in values]
    data = ReportData(
        metrics=figures,
        videos=evaluation.videos,
        prompts=evaluation.prompts,
        curves={"Training": curves} if curves.is_file() else {},
        configs={"Resolved config": resolved} if resolved else {},
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
        eyebrow=" x ".join(names) or "fastvideo",
    )
    return write_page(path, data)


def write_page(path: Path, data: ReportData, most_prompts: int = 10) -> Path:
    """Write the page to ``path``, whole or not at all.

    Raises:
        ValueError: if there is no row to show.
    """
    rows = row_names(data.metrics)
    if not rows:
        raise ValueError("a report needs at least one row of figures")
    height, width = next(iter(data.videos.values())).shape[-2:]
    template = Template(files("fastvideo.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(headline(data.metrics)),
        eyebrow=escape(data.eyebrow),
        lead=escape(lead(data.metrics)),
        facts=facts(data.metrics),
        aspect=f"{width} / {height}",
        rendering="pixelated" if height <= TINY else "auto",
        videos=video_table(data, most_prompts),
        figures_lead=escape(FIGURES_LEAD),
        cost=cost_chart(marks(data.metrics), data.metrics[rows[0]]["frechet_floor"], "Fréchet distance"),
        figures=figures_table(data.metrics),
        curves=curve_section(data.curves),
        details=details(data),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def video_table(data: ReportData, most: int) -> str:
    """Prompts down, models across."""
    names = [name for name in row_names(data.metrics) if name in data.videos]
    count = min(most, len(data.prompts), *(len(data.videos[name]) for name in names))
    heads = "".join(f'<th scope="col">{escape(title_of(name, data.metrics[name]))}</th>' for name in names)
    body = []
    for index in range(count):
        prompt = data.prompts[index]
        cells = "".join(
            f'<td class="{"student" if name.startswith("student") else "other"}">'
            f"{media(data.videos[name][index], data.fps, f'{title_of(name, data.metrics[name])}: {prompt}')}</td>"
            for name in names
        )
        body.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    return f'<table class="videos"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def media(video: Tensor, fps: int, described: str) -> str:
    """A looping video ``[3, T, H, W]`` as an element with its data inside."""
    suffix = ".apng" if video.shape[2] <= TINY else ".mp4"
    source = f"data:{FORMATS[suffix].mime};base64,{base64.b64encode(video_bytes(video, suffix, fps)).decode()}"
    if suffix == ".apng":
        return f'<img src="{source}" alt="{escape(described)}">'
    return f'<video src="{source}" aria-label="{escape(described)}" autoplay loop muted playsinline></video>'


def curve_section(curves: Mapping[str, Path]) -> str:
    """Every metric of every run as a small chart."""
    parts = []
    for number, (title, path) in enumerate(curves.items()):
        charts = "".join(line_chart(name, series) for name, series in grouped(read_curves(path)).items())
        parts.append(
            f'<section aria-labelledby="curves{number}"><h2 id="curves{number}">{escape(title)}</h2>'
            f'<p class="soft">Over training steps.</p><div class="charts">{charts}</div></section>'
        )
    return "".join(parts)


def details(data: ReportData) -> str:
    """Configs and environment."""
    parts = [
        f'<details class="card"><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>'
        for title, text in data.configs.items()
    ]
    settings = {**data.environment, **data.metrics.get("evaluation", {})}
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in settings.items())
    table = f'<table class="environment"><tbody>{rows}</tbody></table>'
    parts.append(f'<details class="card" open><summary>Environment and evaluation</summary>{table}</details>')
    return "".join(parts)
