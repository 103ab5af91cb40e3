"""Figures in words and in a table: what the report says about ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fastvideo.evaluation.charts import Mark

Metrics = Mapping[str, Any]
COLUMNS = (
    ("digit_accuracy", "digit", 3),
    ("colour_accuracy", "colour", 3),
    ("direction_accuracy", "direction", 3),
    ("frechet", "Fréchet", 1),
    ("frechet_pixel", "pixel distance", 0),
    ("diversity", "diversity", 2),
)
KINDS = {"teacher": "Teacher", "untrained": "Student before training", "student": "Student"}


def row_names(metrics: Metrics) -> list[str]:
    """The keys of ``metrics.json`` that are rows, in order."""
    return [name for name, value in metrics.items() if isinstance(value, Mapping) and "frechet" in value]


def kind_of(name: str) -> str:
    """``teacher``, ``untrained`` or ``student``; the whole name for anything else."""
    kind = name.rsplit("_", 1)[0]
    return kind if kind in KINDS else name


def title_of(name: str, row: Metrics) -> str:
    """A row's name for people, such as "Teacher, 50 steps, guided"."""
    kind = kind_of(name)
    steps = "1 step" if row["steps"] == 1 else f"{row['steps']} steps"
    guided = "" if row["guidance"] == 1.0 else ", guided"
    return f"{KINDS[kind]}, {steps}{guided}" if kind in KINDS else name


def style_of(name: str) -> str:
    """The colour class of a row."""
    return {"student": "student", "untrained": "baseline"}.get(kind_of(name), "teacher")


def _pair(metrics: Metrics) -> tuple[Metrics, Metrics] | None:
    """The teacher and the student that are compared: of each the row with the most calls."""
    found = []
    for kind in ("teacher", "student"):
        rows = [metrics[name] for name in row_names(metrics) if kind_of(name) == kind]
        if not rows:
            return None
        found.append(max(rows, key=lambda row: int(row["network_calls"])))
    return found[0], found[1]


def headline(metrics: Metrics) -> str:
    """The result in one line."""
    pair = _pair(metrics)
    if pair is None:
        return "Figures of " + ", ".join(row_names(metrics))
    teacher, student = pair
    faster = teacher["denoise_seconds_per_video"] / student["denoise_seconds_per_video"]
    return f"{student['network_calls']} network calls instead of {teacher['network_calls']}: {faster:.0f}\u00d7 faster"


def lead(metrics: Metrics) -> str:
    """What the headline cost, in one sentence."""
    pair = _pair(metrics)
    if pair is None:
        return "Each model on the same held-out prompts and noise."
    teacher, student = pair
    run = metrics.get("distillation", {})
    made = f" Distilled in {run['wall_seconds'] / 60:.1f} minutes." if "wall_seconds" in run else ""
    return (
        f"The student's videos lie at a Fréchet distance of {student['frechet']:.1f} from real ones, its teacher's at "
        f"{teacher['frechet']:.1f}; a perfect model would score {student['frechet_floor']:.1f}.{made}"
    )


def facts(metrics: Metrics) -> str:
    """The comparison's main numbers as definition-list items."""
    pair = _pair(metrics)
    if pair is None:
        return ""
    teacher, student = pair
    ratio = student["frechet"] / teacher["frechet"]
    items = [
        ("Fréchet distance, student", f"{student['frechet']:.1f}", f"{ratio:.2f}\u00d7 its teacher's"),
        ("Digit as asked", _percent(student["digit_accuracy"]), f"teacher {_percent(teacher['digit_accuracy'])}"),
        ("Denoising one video", _time(student), f"teacher {_time(teacher)}"),
    ]
    run = metrics.get("distillation", {})
    if "wall_seconds" in run:
        updates = f"{run['student_updates']} student updates" if "student_updates" in run else ""
        items.append(("Distillation", f"{run['wall_seconds'] / 60:.1f} min", updates))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in items
    )


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def _time(row: Metrics, key: str = "denoise_seconds_per_video") -> str:
    seconds = row[key]
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def marks(metrics: Metrics) -> list[Mark]:
    """Each row as a point of the cost chart."""
    result = []
    for name in row_names(metrics):
        row = metrics[name]
        low, high = row["intervals"]["frechet"]
        result.append(Mark(title_of(name, row), row["network_calls"], row["frechet"], low, high, style_of(name)))
    return result


def figures_table(metrics: Metrics) -> str:
    """All rows with intervals, sample counts and the floors."""
    rows = [metrics[name] for name in row_names(metrics)]
    heads = "".join(f'<th scope="col">{head}</th>' for _, head, _ in COLUMNS)
    body = "".join(_figures_row(name, metrics[name]) for name in row_names(metrics))
    floor = f"{rows[0]['frechet_floor']:.1f}", f"{rows[0].get('frechet_pixel_floor', float('nan')):.0f}"
    body += (
        '<tr><th scope="row">Real videos through the VAE<small>floor, same sample size</small></th><td></td>'
        f"<td></td><td></td><td></td><td>{floor[0]}</td><td>{floor[1]}</td><td></td><td></td><td></td></tr>"
    )
    counts = rows[0]["counts"]
    named = ", ".join(f"{counts[key]} name the {head}" for key, head, _ in COLUMNS[:3])
    return (
        f'<table><thead><tr><th scope="col">model</th><th scope="col">calls</th>{heads}<th scope="col">denoising</th>'
        f'<th scope="col">end to end</th></tr></thead><tbody>{body}</tbody><caption>{rows[0]["samples"]} prompts, of '
        f"which {named}; diversity over {counts['diversity']} prompts. Small print: 95 % bootstrap intervals over "
        f"prompts. Time per video at batch size {rows[0]['batch_size']}, median; end to end adds text encoding and VAE."
        "</caption></table>"
    )


def _figures_row(name: str, row: Metrics) -> str:
    cells = []
    for key, _, digits in COLUMNS:
        low, high = row["intervals"][key]
        shown = (
            "n/a"
            if row[key] is None
            else f"{row[key]:.{digits}f}<small>{low:.{digits}f}&ndash;{high:.{digits}f}</small>"
        )
        cells.append(f"<td>{shown}</td>")
    guidance = "no guidance" if row["guidance"] == 1.0 else f"guidance {row['guidance']:g}"
    title = f"{escape(title_of(name, row))}<small>{guidance}, {row['sampler']}</small>"
    times = f"<td>{_time(row)}</td><td>{_time(row, 'end_to_end_seconds_per_video')}</td>"
    head = f'<tr class="{style_of(name)}"><th scope="row">{title}</th><td>{row["network_calls"]}</td>'
    return f"{head}{''.join(cells)}{times}</tr>"
