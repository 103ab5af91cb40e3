"""The chart of what a video costs and how far from real ones it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastvideo.evaluation.charts import Axis, grid, legend, svg

Box = tuple[float, float, float]
"""Left, right and baseline of a text."""
LETTER = 6.4
"""Pixels of an average letter of a label."""


@dataclass(frozen=True)
class Mark:
    """One row: where it stands, its interval, what it is called, its colour class and what that colour means."""

    label: str
    calls: int
    value: float
    low: float
    high: float
    style: str
    meaning: str


def cost_chart(marks: Sequence[Mark], floor: float, label: str) -> str:
    """Distance over network calls, both logarithmic, with intervals and the floor: a wide and a narrow drawing.

    The page shows one of the two; text of a wide drawing would be too small to read on a phone.
    """
    meanings = {mark.meaning: mark.style for mark in marks}
    keys = legend([(style, meaning) for meaning, style in meanings.items()])
    wide, narrow = _drawing(marks, floor, label, 860, 330, "wide"), _drawing(marks, floor, label, 340, 300, "narrow")
    title = f"<span>{escape(label)} <small>by network calls, both logarithmic; bars: 95 % intervals</small></span>"
    return f'<figure class="cost"><figcaption>{title}{keys}</figcaption>{wide}{narrow}</figure>'


def _drawing(marks: Sequence[Mark], floor: float, label: str, width: int, height: int, style: str) -> str:
    x = Axis.over([mark.calls for mark in marks], 48, width - 24, True)
    lows = [max(mark.low, mark.value / 10) for mark in marks]  # a logarithmic axis has no zero
    y = Axis.over([floor, *lows, *(mark.high for mark in marks)], height - 42, 12, True)
    parts = grid(x, y, width, x_ticks=_apart(x, sorted({float(mark.calls) for mark in marks})))
    parts.append(f'<line class="floor" x1="{x.start}" x2="{width - 12}" y1="{y(floor)}" y2="{y(floor)}"/>')
    note = "a perfect model (floor)"
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
    """The name of a mark beside it, lower where something stands already: equal results share a spot."""
    length, flipped = LETTER * len(text), cx > 0.7 * width
    left = cx - 11 - length if flipped else cx + 11
    while any(abs(baseline - v) < 13 and left < b and a < left + length for a, b, v in taken):
        baseline += 14
    beside = f'x="{cx - 11}" text-anchor="end"' if flipped else f'x="{cx + 11}"'
    return f'<text class="label" {beside} y="{baseline}">{escape(text)}</text>', (left, left + length, baseline)
