"""The page around the content: one HTML file that holds everything it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from fastvideo.evaluation.charts import Point, line_chart
from fastvideo.files import replace_file

WORDS = {
    "frechet": "Fréchet distance",
    "frechet_pixel": "pixel distance",
    "dmd_gradient_rms": "DMD gradient, RMS",
    "grad_norm": "gradient norm",
    "ema": "averaged weights",
}
"""Metric names that are more than their words."""
Curves = Mapping[str, Mapping[str, Sequence[Point]]]
"""Points by series, by metric name."""


@dataclass(frozen=True)
class Head:
    """The top of a page, as text; ``facts`` is the HTML of definition-list items."""

    title: str
    eyebrow: str
    lead: str
    meta: str
    facts: str = ""


def write_page(path: Path, head: Head, sections: Iterable[str]) -> Path:
    """Write the page to ``path``, whole or not at all."""
    template = Template(files("fastvideo.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(head.title),
        eyebrow=escape(head.eyebrow),
        lead=escape(head.lead),
        meta=escape(head.meta),
        facts=f'<dl class="facts">{head.facts}</dl>' if head.facts else "",
        sections="\n".join(filter(None, sections)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def section(name: str, title: str, lead: str, body: str) -> str:
    """A section under a heading; nothing without a body. ``lead`` is text, ``body`` HTML."""
    if not body:
        return ""
    below = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{below}\n{body}</section>'


def card(body: str) -> str:
    """A framed block; nothing without a body."""
    return f'<div class="card">{body}</div>' if body else ""


def fold(title: str, body: str) -> str:
    """A block that opens on a click."""
    return f'<details class="card"><summary>{escape(title)}</summary>{body}</details>'


def pre(text: str) -> str:
    """Text as it stands; long lines wrap."""
    return f"<pre>{escape(text)}</pre>"


def settings_list(values: Mapping[str, Any]) -> str:
    """Names and values."""
    items = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items())
    return f'<dl class="settings">{items}</dl>'


def metric_title(name: str) -> str:
    """A logged metric's name for people: ``critic/grad_norm`` is "Critic: gradient norm"."""
    *where, last = name.split("/")
    parts = [WORDS.get(part, part.replace("_", " ")) for part in where if part != "validation"]
    text = ": ".join([*parts, WORDS.get(last, last.replace("_", " "))])
    return text[:1].upper() + text[1:]


def curve_sections(curves: Curves) -> str:
    """Validation and losses as charts, other metrics folded away, and what was logged only once as text."""
    lines = {name: series for name, series in curves.items() if any(len(line) > 1 for line in series.values())}
    validation = {name: series for name, series in lines.items() if name.startswith("validation")}
    losses = {name: series for name, series in lines.items() if name.endswith("loss")}
    others = {name: series for name, series in lines.items() if name not in validation and name not in losses}
    parts = [_charts(title, group) for title, group in (("Validation", validation), ("Losses", losses)) if group]
    if others:
        parts.append(fold(f"{len(others)} more curves", f'<div class="charts">{_drawn(others)}</div>'))
    once = {name: series for name, series in curves.items() if name not in lines}
    return "".join(parts) + _logged_once(once)


def _charts(title: str, group: Curves) -> str:
    return f'<h3>{title}</h3><div class="charts">{_drawn(group)}</div>'


def _drawn(group: Curves) -> str:
    return "".join(line_chart(metric_title(name), series) for name, series in sorted(group.items()))


def _logged_once(curves: Curves) -> str:
    if not curves:
        return ""
    values = {
        metric_title(name): ", ".join(
            f"{f'{label} ' if label else ''}{line[0][1]:.4g} at step {line[0][0]:.0f}"
            for label, line in series.items()
            if line
        )
        for name, series in sorted(curves.items())
    }
    return fold("Logged once, so not a curve", settings_list(values))


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as dotted ones, values as YAML on one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    return flat
