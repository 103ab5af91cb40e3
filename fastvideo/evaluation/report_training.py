"""Training on the page: curves, values logged once, alarms, and the last validation's figures with their bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastvideo.evaluation.alarms import DIFFERENCES, Band, bands, compare
from fastvideo.evaluation.charts import Series, line_chart
from fastvideo.evaluation.report_run import Point, Run
from fastvideo.evaluation.tables import Cell, Line, Table

Curves = Mapping[str, Series]
"""Points by series, by metric name."""
WORDS = {
    "frechet": "Fréchet distance",
    "frechet_pixel": "pixel distance",
    "dmd_gradient_rms": "DMD gradient, RMS",
    "grad_norm": "gradient norm",
    "ema": "averaged weights",
    "latent_std": "spread of the latents",
    "latent_mean": "mean of the latents",
    "colour": "tint, worst channel",
    "grid": "grid at block borders",
    "late_motion": "motion, last quarter over first",
    "late_brightness": "brightness, last quarter over first",
    "diversity": "difference between seeds",
    "update_balance": "critic's movement over the student's",
}
"""Readable names of metrics."""
BETTER = {"frechet": "lower", "frechet_pixel": "lower", "accuracy": "higher"}
"""Good direction of a metric, by the last part of its name or the last word of that."""


def metric_title(name: str) -> str:
    """A logged metric's name for people: ``critic/grad_norm`` is "Critic: gradient norm"."""
    *where, last = name.split("/")
    parts = [WORDS.get(part, part.replace("_", " ")) for part in where if part != "validation"]
    text = ": ".join([*parts, WORDS.get(last, last.replace("_", " "))])
    return text[:1].upper() + text[1:]


def curves_of(runs: Sequence[Run]) -> Curves:
    """Curves by metric, with a series per run; a run without the metric keeps its place and colour, empty.

    For one run, ``validation/NETWORK/METRIC`` of several networks share one chart instead.
    """
    if len(runs) > 1:
        names = sorted({name for run in runs for name in run.curves})
        return {name: {run.name: run.curves.get(name, ()) for run in runs} for name in names}
    charts: dict[str, dict[str, Sequence[Point]]] = {}
    for name, points in sorted(runs[0].curves.items()):
        parts = name.split("/")
        shared = parts[0] == "validation" and len(parts) == 3
        title, series = (f"validation/{parts[2]}", parts[1]) if shared else (name, "")
        charts.setdefault(title, {})[series] = list(points)
    return charts


def chart_groups(curves: Curves) -> tuple[dict[str, list[str]], list[str]]:
    """Charts of validation and losses by heading, and those of the other metrics."""
    lines = {name: series for name, series in curves.items() if any(len(line) > 1 for line in series.values())}
    validation = {name: series for name, series in lines.items() if name.startswith("validation")}
    losses = {name: series for name, series in lines.items() if name.endswith("loss")}
    others = {name: series for name, series in lines.items() if name not in validation and name not in losses}
    groups = {"Validation": validation, "Losses": losses}
    return {title: _drawn(group) for title, group in groups.items() if group}, _drawn(others)


def _drawn(group: Curves) -> list[str]:
    return [line_chart(metric_title(name), series) for name, series in sorted(group.items())]


def once_table(runs: Sequence[Run]) -> Table | None:
    """Values logged once, with their good direction, except those of the health table."""
    names = sorted({name for run in runs for name in run.curves})
    single = [name for name in names if all(len(run.curves.get(name, ())) < 2 for run in runs)]
    lines = [_once_line(runs, name) for name in single if not name.startswith("health/")]
    heads = [Cell("metric"), *_run_heads(runs, "value"), Cell("better")]
    return Table("values", heads, [lines]) if lines else None


def _once_line(runs: Sequence[Run], name: str) -> Line:
    last = name.rsplit("/", 1)[-1]
    better = BETTER.get(last) or BETTER.get(last.rsplit("_", 1)[-1], "")
    points = [run.curves.get(name, ()) for run in runs]
    cells = [Cell(f"{line[0][1]:.4g}", f"at step {line[0][0]:.0f}") if line else Cell("\u2014") for line in points]
    return Line(Cell(metric_title(name)), [*cells, Cell(better)])


def _run_heads(runs: Sequence[Run], alone: str) -> list[Cell]:
    return [Cell(run.name) for run in runs] if len(runs) > 1 else [Cell(alone)]


def alarm_list(runs: Sequence[Run]) -> list[tuple[str, dict[str, str]]]:
    """Per run with validations: a text, and its alarms with steps and the last one's sentence."""
    found = []
    for run in runs:
        if run.health:
            name, alarms = f"{run.name}: " if len(runs) > 1 else "", _alarms(run)
            count = f"{len(run.health)} validation{'' if len(run.health) == 1 else 's'}"
            text = f"{name}alarms in {count}:" if len(runs) > 1 else ""
            found.append((text if alarms else f"{name}No alarm in {count}.", alarms))
    return found


def _alarms(run: Run) -> dict[str, str]:
    raised: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for line in run.health:
        for alarm in line["alarms"]:
            raised.setdefault(alarm["name"], []).append(line["step"])
            texts[alarm["name"]] = alarm["text"]
    return {f"{name}, at step {', '.join(map(str, steps))}": texts[name] for name, steps in raised.items()}


class _Health:
    """Figures of a run's last validation: the student's, the reference's, and the comparison of both."""

    def __init__(self, run: Run) -> None:
        line = run.health[-1] if run.health else {}
        self.step = line.get("step")
        self.source = next((name for name in ("teacher", "real") if line.get(name)), "")
        self.student, self.reference = _finite(line.get("student")), _finite(line.get(self.source))
        channels = {"red", "green", "blue"} <= self.student.keys() & self.reference.keys()
        compared = compare(self.student, self.reference) if channels else {}
        self.values = {**compared, **_finite(line.get("training"))}
        self.compared, self.bands = compared.keys(), bands(run.settings.get("health") or {})

    def cell(self, name: str) -> Cell:
        """A figure relative to the reference, or as measured; marked if it lies outside its band."""
        if name not in self.values:
            return Cell("\u2014")
        value = self.values[name]
        low, high = self.bands.get(name, (-math.inf, math.inf))
        outside = not low <= value <= high
        text = f"{_text(name, value, name in self.compared)}{', outside' if outside else ''}"
        raw = name in self.student and name in self.reference
        small = f"{self.student[name]:.3g}; {self.source} {self.reference[name]:.3g}" if raw else ""
        return Cell(text.replace("-", "\u2212"), small.replace("-", "\u2212"), "off" if outside else "")


def health_table(runs: Sequence[Run]) -> Table | None:
    """The student's figures relative to the reference in the last validation, with the band of each."""
    found = [_Health(run) for run in runs]
    names = dict.fromkeys(name for health in found for name in health.values)
    first: dict[str, Band] = {name: band for health in reversed(found) for name, band in health.bands.items()}
    relative = {name for health in found for name in health.compared}
    banded = sorted(names, key=lambda name: name not in first)
    lines = [
        Line(
            Cell(metric_title(name)),
            [*(health.cell(name) for health in found), Cell(_band(name, first.get(name), name in relative))],
        )
        for name in banded
    ]
    steps = [f"step {health.step}" if health.values else "" for health in found]
    over = [head._replace(small=step) for head, step in zip(_run_heads(runs, "student"), steps, strict=True)]
    return Table("health", [Cell("figure"), *over, Cell("healthy")], [lines]) if lines else None


def _text(name: str, value: float, relative: bool) -> str:
    if not relative:
        return f"{value:.3g}"
    return f"{100 * value:+.1f} points" if name in DIFFERENCES else f"{100 * value:.0f}\u00a0%"


def _band(name: str, band: Band | None, relative: bool) -> str:
    if band is None:
        return ""
    low, high = band
    if low == -high:
        return f"within \u00b1{100 * high:g} points"
    low_text, high_text = (f"{100 * end:.0f}\u00a0%" if relative else f"{end:g}" for end in (low, high))
    if math.isinf(high):
        return f"at least {low_text}"
    return f"at most {high_text}" if low == 0 else f"{low_text} to {high_text}"


def _finite(values: object) -> dict[str, float]:
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {name: float(value) for name, value in pairs if isinstance(value, int | float) and math.isfinite(value)}
