"""Charts as inline SVG without script or external resource; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from fastvideo.evaluation.report_run import Point

Series = Mapping[str, Sequence[Point]]
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 38
MANY = 240
"""Points above which a curve is thinned: about the pixels that show it."""
COLOURS = 6
"""Colours of the style sheet; further series repeat them with dashes."""
Box = tuple[float, float, float]
"""Left, right and baseline of a text."""
LETTER = 6.4
"""Pixels of an average letter of a label."""


def series_class(index: int) -> str:
    """The style of the ``index``-th series, the same in every chart of a page."""
    return f"s{index % COLOURS}" + (" dashed" if index // COLOURS % 2 else "")


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
    """Curves over steps; logarithmic when positive values span more than a factor 30.

    An empty series is skipped without changing the styles of the others.
    """
    points = [point for line in series.values() for point in line]
    values = [y for _, y in points]
    log = min(values) > 0 and max(values) > 30 * min(values)
    x = Axis.over([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y = Axis.over(values, HEIGHT - BOTTOM, TOP, log)
    if not log and max(values) == 1.0:  # a share: nothing above it exists
        y = replace(y, high=1.0)
    drawn = [(series_class(i), name, line) for i, (name, line) in enumerate(series.items()) if line]
    parts = grid(x, y)
    for style, name, line in drawn:
        parts += _curve(x, y, style, name, line)
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">training step</text>')
    described = f"{title}: " + "; ".join(
        f"{name + ' ' if name else ''}from {line[0][1]:.4g} to {line[-1][1]:.4g} at step {line[-1][0]:.0f}"
        for _, name, line in drawn
    )
    note = " <small>logarithmic</small>" if log else ""
    keys = legend([(style, name) for style, name, _ in drawn if name])
    caption = f"<figcaption><span>{escape(title)}{note}</span>{keys}</figcaption>"
    return f'<figure class="chart">{caption}{svg(described, parts)}</figure>'


@dataclass(frozen=True)
class Banded:
    """A curve with its interval: name, colour class, and (x, value, low, high) of each point."""

    name: str
    style: str
    points: Sequence[tuple[float, float, float, float]]


def band_chart(title: str, curves: Sequence[Banded], note: str = "", label: str = "frame") -> str:
    """Curves over frames, each on the band of its interval; curves without points are left out."""
    curves = [curve for curve in curves if curve.points]
    ends = [end for curve in curves for _, *three in curve.points for end in three]
    x = Axis.over([point[0] for curve in curves for point in curve.points], LEFT, WIDTH - RIGHT)
    y = Axis.over(ends, HEIGHT - BOTTOM, TOP)
    if max(ends) == 1.0 and min(ends) >= 0.0:  # a share: nothing above it exists
        y = replace(y, high=1.0)
    parts = grid(x, y)
    parts += [_band(x, y, curve) for curve in curves]
    for curve in curves:
        parts += _curve(x, y, curve.style, curve.name, [point[:2] for point in curve.points])
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(label)}</text>')
    described = f"{title}: " + "; ".join(
        f"{c.name} from {c.points[0][1]:.4g} to {c.points[-1][1]:.4g} at {label} {c.points[-1][0]:.0f}" for c in curves
    )
    keys = legend([(curve.style, curve.name) for curve in curves])
    small = f" <small>{escape(note)}</small>" if note else ""
    caption = f"<figcaption><span>{escape(title)}{small}</span>{keys}</figcaption>"
    return f'<figure class="chart">{caption}{svg(described, parts)}</figure>'


def _band(x: Axis, y: Axis, curve: Banded) -> str:
    low, high = (thinned([(point[0], point[end]) for point in curve.points]) for end in (2, 3))
    path = " ".join(f"{x(a)},{y(b)}" for a, b in [*low, *reversed(high)])
    return f'<polygon class="band {curve.style}" points="{path}"/>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in entries)
    return f'<span class="keys">{keys}</span>' if keys else ""


def _curve(x: Axis, y: Axis, style: str, name: str, line: Sequence[Point]) -> list[str]:
    path = " ".join(f"{x(a)},{y(b)}" for a, b in thinned(line))
    parts = [f'<polyline class="line {style}" points="{path}"><title>{escape(name)}</title></polyline>']
    if len(line) < 40:
        parts += [f'<circle class="dot {style}" cx="{x(a)}" cy="{y(b)}" r="2"/>' for a, b in line]
    return parts


def thinned(line: Sequence[Point]) -> list[Point]:
    """Means of neighbours, so that a long curve stays small."""
    size = math.ceil(len(line) / MANY)
    chunks = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def short(value: float) -> str:
    """A tick's number in the width that the margin has."""
    text = f"{value:.4g}"
    return text if len(text) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def grid(
    x: Axis, y: Axis, width: int = WIDTH, *, x_ticks: Sequence[float] | None = None, right: int = RIGHT
) -> list[str]:
    """Horizontal lines with their values, and the values of the x axis below."""
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{width - right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{x.start - 6}" y="{at + 3.5}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks(5) if x_ticks is None else x_ticks:
        parts.append(f'<text class="tick" x="{x(tick)}" y="{y.start + 16}" text-anchor="middle">{short(tick)}</text>')
    return parts


def svg(described: str, parts: Sequence[str], width: int = WIDTH, height: int = HEIGHT, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    head = f'<svg{kind} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(described)}">'
    return head + "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Mark:
    """One row: its label, position and interval, its colour class and the meaning of that colour."""

    label: str
    calls: int
    value: float
    low: float
    high: float
    style: str
    meaning: str


def cost_chart(marks: Sequence[Mark], floor: float, label: str, note: str = "a perfect model (floor)") -> str:
    """Distance over network calls, both logarithmic, with intervals and the floor: a wide and a narrow drawing.

    The page shows the narrow one on phones, where text of the wide one would be too small.
    """
    meanings = {mark.meaning: mark.style for mark in marks}
    keys = legend([(style, meaning) for meaning, style in meanings.items()])
    named = (marks, (floor, note), label)
    wide, narrow = _drawing(*named, 860, 330, "wide"), _drawing(*named, 340, 300, "narrow")
    title = f"<span>{escape(label)} <small>by network calls, both logarithmic; bars: 95 % intervals</small></span>"
    return f'<figure class="cost"><figcaption>{title}{keys}</figcaption>{wide}{narrow}</figure>'


def _drawing(marks: Sequence[Mark], line: tuple[float, str], label: str, width: int, height: int, style: str) -> str:
    floor, note = line
    x = Axis.over([mark.calls for mark in marks], 48, width - 24, True)
    lows = [max(mark.low, mark.value / 10) for mark in marks]  # a logarithmic axis has no zero
    y = Axis.over([floor, *lows, *(mark.high for mark in marks)], height - 42, 12, True)
    parts = grid(x, y, width, x_ticks=_apart(x, sorted({float(mark.calls) for mark in marks})))
    parts.append(f'<line class="floor" x1="{x.start}" x2="{width - 12}" y1="{y(floor)}" y2="{y(floor)}"/>')
    taken = [(x(mark.calls) - 8, x(mark.calls) + 8, y(mark.value) + 4) for mark in marks]
    taken.append((x.start, x.start + LETTER * len(note), y(floor) + 13))
    parts.append(f'<text class="note" x="{x.start + 4}" y="{y(floor) + 13}">{note}</text>')
    for mark, low in zip(marks, lows, strict=True):
        cx, cy = x(mark.calls), y(mark.value)
        name, box = _label(mark.label, cx, cy + 4, width, taken)
        taken.append(box)
        parts.append(f'<line class="bar {mark.style}" x1="{cx}" x2="{cx}" y1="{y(low)}" y2="{y(mark.high)}"/>')
        parts.append(f'<circle class="mark {mark.style}" cx="{cx}" cy="{cy}" r="6"/>')
        parts.append(name)
    parts.append(
        f'<text class="tick" x="{(48 + width) / 2}" y="{height - 6}" text-anchor="middle">network calls</text>'
    )
    described = f"{label} over network calls: " + "; ".join(
        f"{m.meaning}, {m.label} {m.value:.3g} at {m.calls}" for m in marks
    )
    return svg(described, parts, width, height, style)


def _apart(x: Axis, ticks: Sequence[float]) -> list[float]:
    """The ticks that leave room for each other's numbers."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or x(tick) - x(kept[-1]) > 18:
            kept.append(tick)
    return kept


def _label(text: str, cx: float, baseline: float, width: int, taken: Sequence[Box]) -> tuple[str, Box]:
    """The name beside a mark, and its box; lower if another box is in the way, as with equal results."""
    length, flipped = LETTER * len(text), cx > 0.7 * width
    left = cx - 11 - length if flipped else cx + 11
    while any(abs(baseline - v) < 13 and left < b and a < left + length for a, b, v in taken):
        baseline += 14
    beside = f'x="{cx - 11}" text-anchor="end"' if flipped else f'x="{cx + 11}"'
    return f'<text class="label" {beside} y="{baseline}">{escape(text)}</text>', (left, left + length, baseline)
