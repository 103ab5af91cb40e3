"""Figures in words: what the report says about ``metrics.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any, NamedTuple

from fastvideo.evaluation.charts_cost import Mark

Metrics = Mapping[str, Any]
KINDS = {"teacher": "Teacher", "untrained": "Student before training", "student": "Student"}
SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""
STYLES = {"student": "student", "untrained": "baseline"}


@dataclass(frozen=True)
class Column:
    """A figure of every row: its key, its heading, its digits, and which way is better."""

    key: str
    head: str
    digits: int
    lower_is_better: bool = False
    percent: bool = False

    def shown(self, value: float) -> float:
        """A value as far as it is printed, never minus zero."""
        return round(value * (100 if self.percent else 1), self.digits) + 0.0

    def text(self, value: float | None, signed: bool = False) -> str:
        """A value for people; ``signed`` for differences, in percentage points where the figure is a percentage."""
        if value is None:
            return "n/a"
        text = f"{self.shown(value):{'+' if signed else ''}.{self.digits}f}"
        text = text.replace("-", "\u2212")
        return f"{text}{SPACE}%" if self.percent and not signed else text


COLUMNS = (
    Column("digit_accuracy", "digit", 1, percent=True),
    Column("colour_accuracy", "colour", 1, percent=True),
    Column("direction_accuracy", "direction", 1, percent=True),
    Column("frechet", "Fréchet", 1, lower_is_better=True),
    Column("frechet_pixel", "pixel distance", 0, lower_is_better=True),
    Column("diversity", "diversity", 2),
)
FRECHET = COLUMNS[3]


class Difference(NamedTuple):
    """One figure minus another, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def difference(row: Metrics, other: Metrics, key: str) -> Difference | None:
    """``row - other`` of a figure, from their two intervals; ``None`` if either is undefined.

    The ends are combined as for independent samples (Zou and Donner 2008, MOVER). Rows share prompts and noise, which
    makes their errors alike, so a paired interval would be narrower: what is called sure here is sure.
    """
    if row[key] is None or other[key] is None:
        return None
    a, b = row[key], other[key]
    (a_low, a_high), (b_low, b_high) = row["intervals"][key], other["intervals"][key]
    return Difference(a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low))


def row_names(metrics: Metrics) -> list[str]:
    """The keys of ``metrics.json`` that are rows, in order."""
    return [name for name, value in metrics.items() if isinstance(value, Mapping) and "frechet" in value]


def kind_of(name: str, row: Metrics) -> str:
    """``teacher``, ``untrained`` or ``student``; nothing if neither row nor name say so."""
    kind = str(row.get("kind") or name.rsplit("_", 1)[0])
    return kind if kind in KINDS else ""


def titles_of(metrics: Metrics) -> dict[str, str]:
    """Names of all rows for people, such as "Teacher, 50 steps, guided"; where two would be alike, the rows' own."""
    titles = {name: _title(name, metrics[name]) for name in row_names(metrics)}
    return {name: title if list(titles.values()).count(title) == 1 else name for name, title in titles.items()}


def _title(name: str, row: Metrics) -> str:
    kind = kind_of(name, row)
    if not kind:
        return PurePath(name).name
    return f"{KINDS[kind]}, {steps_of(row)}{'' if row['guidance'] == 1.0 else ', guided'}"


def steps_of(row: Metrics) -> str:
    """Such as "4 steps"."""
    return "1 step" if row["steps"] == 1 else f"{row['steps']} steps"


def style_of(name: str, row: Metrics) -> str:
    """The colour class of a row."""
    return STYLES.get(kind_of(name, row), "teacher")


def of_kind(metrics: Metrics, kind: str) -> list[Metrics]:
    """The rows of a kind, most network calls first."""
    rows = [metrics[name] for name in row_names(metrics) if kind_of(name, metrics[name]) == kind]
    return sorted(rows, key=lambda row: -int(row["network_calls"]))


def pair(metrics: Metrics) -> tuple[Metrics, Metrics] | None:
    """The teacher and the student that are compared: of each the row with the most calls, if there is one such row."""
    best = []
    for rows in (of_kind(metrics, "teacher"), of_kind(metrics, "student")):
        if not rows or sum(row["network_calls"] == rows[0]["network_calls"] for row in rows) > 1:
            return None
        best.append(rows[0])
    return best[0], best[1]


def headline(metrics: Metrics) -> str:
    """The result in one line."""
    found = pair(metrics)
    if found is None:
        names = list(titles_of(metrics).values())
        return f"Figures of {names[0]}" if len(names) == 1 else f"{len(names)} models side by side"
    teacher, student = found
    faster = teacher["denoise_seconds_per_video"] / student["denoise_seconds_per_video"]
    return f"{student['network_calls']} network calls instead of {teacher['network_calls']}: {faster:.0f}\u00d7 faster"


def lead(metrics: Metrics) -> str:
    """What the headline cost, in one sentence."""
    found = pair(metrics)
    if found is None:
        return "Each model on the same held-out prompts and noise."
    teacher, student = found
    few = [row for row in of_kind(metrics, "teacher") if row["steps"] == student["steps"] and row is not teacher]
    in_few = f" and at {FRECHET.text(few[0]['frechet'])} with {steps_of(few[0])}" if few else ""
    guided = "" if teacher["guidance"] == 1.0 else " guided"
    return (
        f"The student's videos lie at a Fréchet distance of {FRECHET.text(student['frechet'])} from real ones, its "
        f"teacher's at {FRECHET.text(teacher['frechet'])} with {teacher['steps']}{guided} steps{in_few}; a perfect "
        f"model would score {FRECHET.text(student['frechet_floor'])}."
    )


def measured_on(metrics: Metrics) -> str:
    """On what the figures were taken, such as "512 held-out prompts, seed 0"."""
    settings = metrics.get("evaluation", {})
    samples = metrics[row_names(metrics)[0]]["samples"]
    split = {"heldout": "held-out", "train": "training"}.get(settings.get("split"), "")
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    return " ".join(filter(None, (str(samples), split, "prompts"))) + seed


def facts(metrics: Metrics) -> str:
    """The comparison's main numbers as definition-list items."""
    found = pair(metrics)
    if found is None:
        return ""
    teacher, student = found
    low, high = student["intervals"]["frechet"]
    digit = COLUMNS[0]
    items = [
        ("Fréchet distance", FRECHET.text(student["frechet"]), f"{interval(FRECHET, low, high)}; lower is better"),
        ("Digit as asked", digit.text(student["digit_accuracy"]), f"teacher {digit.text(teacher['digit_accuracy'])}"),
        ("Denoising one video", time_of(student), f"teacher {time_of(teacher)}"),
    ]
    run = metrics.get("distillation", {})
    if "wall_seconds" in run:
        updates = f"{run['student_updates']} student updates" if "student_updates" in run else ""
        items.append(("Distillation", duration(run["wall_seconds"]), updates))
    return fact_list(items)


def fact_list(items: list[tuple[str, str, str]]) -> str:
    """Name, value and note as definition-list items."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in items
    )


def interval(column: Column, low: float | None, high: float | None, signed: bool = False) -> str:
    """Such as "8.4 to 9.9"."""
    ends = (column.text(end, signed).removesuffix(f"{SPACE}%") for end in (low, high))
    return " to ".join(ends)


def duration(seconds: float) -> str:
    """Seconds or minutes."""
    return f"{seconds:.0f}{SPACE}s" if seconds < 100 else f"{seconds / 60:.1f}{SPACE}min"


def time_of(row: Metrics, key: str = "denoise_seconds_per_video") -> str:
    """Seconds or milliseconds per video."""
    seconds = row[key]
    return f"{seconds:.2f}{SPACE}s" if seconds >= 0.1 else f"{1000 * seconds:.1f}{SPACE}ms"


def marks(metrics: Metrics) -> list[Mark]:
    """Each row as a point of the cost chart."""
    result = []
    for name, title in titles_of(metrics).items():
        row, kind = metrics[name], kind_of(name, metrics[name])
        guided = kind == "teacher" and row["guidance"] != 1.0
        meaning = KINDS[kind] + (", guided" if guided else "") if kind else "Model"
        label = steps_of(row) if kind and title != name else PurePath(title).name
        low, high = row["intervals"]["frechet"]
        result.append(Mark(label, row["network_calls"], row["frechet"], low, high, style_of(name, row), meaning))
    return result
