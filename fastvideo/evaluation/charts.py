"""Charts as inline SVG: no script, no external resource; colours come from the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 34
MANY = 400
"""Points above which a curve is thinned: more than the pixels that show it."""


def read_curves(path: Path) -> dict[str, list[Point]]:
    """``(step, value)`` of every metric in a ``metrics.jsonl``; ``step`` is the x axis, times are left out.

    A last line that is not whole is left out too: the run was killed while it wrote it.
    """
    curves: dict[str, list[Point]] = {}
    for record in _records(path.read_text().splitlines()):
        for name, value in record.items():
            if name not in ("step", "time", "seconds") and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((float(record["step"]), float(value)))
    return curves


def _records(lines: Sequence[str]) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in lines[:-1]]
    for line in lines[-1:]:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def grouped(curves: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, Sequence[Point]]]:
    """Charts by title: ``validation/NETWORK/METRIC`` of several networks share the chart ``validation METRIC``."""
    charts: dict[str, dict[str, Sequence[Point]]] = {}
    for name, points in curves.items():
        parts = name.split("/")
        if parts[0] == "validation" and len(parts) == 3:
            charts.setdefault(f"validation: {parts[2].replace('_', ' ')}", {})[parts[1]] = points
        else:
            charts[name.replace("/", ": ").replace("_", " ")] = {"": points}
    return {title: dict(sorted(series.items())) for title, series in charts.items()}


@dataclass(frozen=True)
class Axis:
    """Values to pixels: linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> Axis:
        """An axis that holds all values, with a margin."""
        low, high = min(values), max(values)
        if log:
            return cls(low / 1.3, high * 1.3, start, end, True)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 4) -> list[float]:
        """Round values inside the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found if len(found) <= 2 * count else [t for t in found if f"{t:e}"[0] == "1"]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def line_chart(title: str, series: Series) -> str:
    """Curves over steps; logarithmic when positive values span more than a factor 30."""
    points = [point for line in series.values() for point in line]
    values = [y for _, y in points]
    log = min(values) > 0 and max(values) > 30 * min(values)
    x = Axis.over([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y = Axis.over(values, HEIGHT - BOTTOM, TOP, log)
    lines = []
    for index, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x(a)},{y(b)}" for a, b in _thinned(line))
        lines.append(f'<polyline class="line s{index % 4}" points="{path}"><title>{escape(name)}</title></polyline>')
        lines += [
            f'<circle class="dot s{index % 4}" cx="{x(a)}" cy="{y(b)}" r="2"/>' for a, b in line if len(line) < 40
        ]
    described = f"{title}: from {values[0]:.4g} to {values[-1]:.4g} over {points[-1][0]:.0f} steps"
    legend = "".join(
        f'<span class="key s{index % 4}">{escape(name)}</span>' for index, name in enumerate(series) if name
    )
    svg = _svg(described, [*_grid(x, y), *lines])
    return f'<figure class="chart"><figcaption>{escape(title)}<span>{legend}</span></figcaption>{svg}</figure>'


@dataclass(frozen=True)
class Mark:
    """One row in :func:`cost_chart`: where it stands, its interval, what it is called and its colour class."""

    label: str
    calls: int
    value: float
    low: float
    high: float
    style: str


def cost_chart(marks: Sequence[Mark], floor: float, label: str) -> str:
    """Distance over network calls, both logarithmic, with intervals and the floor."""
    width, height = 680, 320
    x = Axis.over([mark.calls for mark in marks], 64, width - 30, True)
    lows = [max(mark.low, mark.value / 10) for mark in marks]  # a logarithmic axis has no zero
    y = Axis.over([floor, *lows, *(mark.high for mark in marks)], height - 44, 16, True)
    parts = _grid(x, y, width, height, sorted({float(mark.calls) for mark in marks}))
    parts.append(f'<line class="floor" x1="{x.start}" x2="{width - 12}" y1="{y(floor)}" y2="{y(floor)}"/>')
    parts.append(f'<text class="note" x="{width - 12}" y="{y(floor) - 6}" text-anchor="end">real videos (floor)</text>')
    taken = [(x(mark.calls) - 8, x(mark.calls) + 8, y(mark.value) + 4) for mark in marks]
    for mark, low in zip(marks, lows, strict=True):
        cx, cy = x(mark.calls), y(mark.value)
        name, box = _label(mark.label, cx, cy + 4, width, taken)
        taken.append(box)
        parts.append(f'<line class="bar {mark.style}" x1="{cx}" x2="{cx}" y1="{y(low)}" y2="{y(mark.high)}"/>')
        parts.append(f'<circle class="mark {mark.style}" cx="{cx}" cy="{cy}" r="6"/>')
        parts.append(name)
    parts.append(
        f'<text class="tick" x="{(64 + width) / 2}" y="{height - 6}" text-anchor="middle">network calls</text>'
    )
    described = f"{label} over network calls: " + "; ".join(f"{m.label} {m.value:.3g} at {m.calls}" for m in marks)
    return _svg(described, parts, width, height)


Box = tuple[float, float, float]
"""Left, right and baseline of a text."""


def _label(text: str, cx: float, baseline: float, width: int, taken: Sequence[Box]) -> tuple[str, Box]:
    """The name of a mark beside it, lower where something stands already: equal results share a spot."""
    length, flipped = 7.2 * len(text), cx > 0.7 * width
    left = cx - 11 - length if flipped else cx + 11
    while any(abs(baseline - v) < 13 and left < b and a < left + length for a, b, v in taken):
        baseline += 14
    beside = f'x="{cx - 11}" text-anchor="end"' if flipped else f'x="{cx + 11}"'
    return f'<text class="label" {beside} y="{baseline}">{escape(text)}</text>', (left, left + length, baseline)


def _short(value: float) -> str:
    """A tick's number in the width that the margin has."""
    text = f"{value:.4g}"
    return text if len(text) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _thinned(line: Sequence[Point]) -> list[Point]:
    """Means of neighbours, so that a long curve stays small."""
    size = math.ceil(len(line) / MANY)
    chunks = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _grid(
    x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT, x_ticks: Sequence[float] | None = None
) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{width - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{x.start - 6}" y="{at + 3.5}" text-anchor="end">{_short(tick)}</text>')
    for tick in x.ticks(6) if x_ticks is None else x_ticks:
        parts.append(f'<text class="tick" x="{x(tick)}" y="{y.start + 16}" text-anchor="middle">{_short(tick)}</text>')
    return parts


def _svg(described: str, parts: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(described)}">'
    return head + "".join(parts) + "</svg>"
