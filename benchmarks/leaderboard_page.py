"""The leaderboard as a page: tables, curves as SVG, a gallery, and the same figures as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.cli.listing import split_paper
from fastvideo.data.video_io import write_video
from fastvideo.distillation.registry import load_method
from fastvideo.evaluation.charts import Axis, Point, Series, grid, series_class, short, svg, thinned

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 720, 360, 56, 16, 44, 190
LETTER = 7
"""Pixels of a letter at most: a long legend makes a chart wider."""
STYLE = """<style>
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #55606d; } .grid { stroke: #e0e5ea; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 3; }
.dot { fill: var(--c); } .s0 { --c: #0f766e; } .s1 { --c: #b93c0a; } .s2 { --c: #6d28d9; } .s3 { --c: #1d5fbf; }
.s4 { --c: #a1155a; } .s5 { --c: #5f6b12; }
</style>"""
COLUMNS = {
    "method": "{}",
    "steps": "{}",
    "network_calls": "{:.0f}",
    "digit_accuracy": "{:.3f}",
    "colour_accuracy": "{:.3f}",
    "direction_accuracy": "{:.3f}",
    "frechet": "{:.2f}",
    "over_seeds": "{}",
    "frechet_pixel": "{:.0f}",
    "diversity": "{:.2f}",
}
COST = {"train_steps": "{:.0f}", "cpu_seconds": "{:.0f}", "wall_seconds": "{:.0f}", "peak_rss_mb": "{:.0f}"}
HEAD = """# Results on the tiny world

Made by `python benchmarks/leaderboard.py --budget {budget}{options}` at revision {revision}, on {cores} cores
({machine}, torch {torch}), fp32, one thread per run.{seeds}

Every method of whole videos distils the same teacher with the same compute ([streaming students](tiny-stream.md) have a
world of their own): its process trains on one thread until it has spent
**{budget} of CPU time** on training steps. CPU time and not wall time is the budget, because other work on the machine
then costs a method nothing. What a recipe needs done beforehand comes out of it: half of it goes to stored
trajectories of the teacher (`kd`) or to the first of two stages (`tcm` after `cm`, `anyflow` after `anyflow_pretrain`).
`cpu seconds` is what the training used in all, with start and validations, and so is wall time; memory is of the
last process. `sft` has no row: it trains a teacher, no student of few steps. Each recipe is
`examples/distillation/tiny_wan_METHOD.yaml`, so steps differ in size and in number.

Then all models get the same {prompts} held-out prompts and the same noise, at 4, 2 and 1 steps. Two steps are the first
and the third of a student's four steps, a ladder that it was not trained for as such (`--ladder` of
`fastvideo evaluate`). Distances are Frechet distances from 2048 other real held-out videos; as many real videos after
the VAE, what a perfect model of the latents would score, are at {floor:.2f}.
What the columns mean: [the tiny world](tiny-world.md). Several seeds of one recipe: [tiny figures](tiny-figures.md).
"""
SEEDS = """
A row is the mean of {} training seeds; `over seeds` is the lowest and the highest distance of them. Curves and videos
are of the first one."""


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """A markdown table."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(cell(row[c], form) for c, form in columns.items()) + " |" for row in rows]


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the tables: means over the runs of several seeds, with their lowest and highest distance."""
    measured = [name for name in (*COLUMNS, *COST) if name not in ("method", "steps", "over_seeds")]
    row = {name: _mean([row[name] for row in rows]) for name in measured}
    distances = [row["frechet"] for row in rows]
    several = len(rows) > 1 and row["frechet"] is not None
    spread = f"{min(distances):.2f}-{max(distances):.2f}" if several else None
    return {"method": rows[0]["method"], "steps": rows[0]["steps"], **row, "over_seeds": spread}


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; none if one is missing: the others' would not be the method's."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def by_distance(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The closest to real videos first."""
    return sorted(rows, key=lambda row: math.inf if row["frechet"] is None else row["frechet"])


def by_method(rows: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Every method's row at a number of steps, over its seeds."""
    at = [row for row in rows if row["steps"] == steps]
    return [over_seeds([row for row in at if row["method"] == name]) for name in dict.fromkeys(r["method"] for r in at)]


def curves(run: Path) -> tuple[list[Point], list[Point]]:
    """Frechet distance of the averaged (or only) weights in validation: against the step, and against CPU seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = [(line["step"], line["cpu_seconds"]) for line in lines if "cpu_seconds" in line]
    steps: list[Point] = []
    for line in lines:
        value = line.get("validation/ema/frechet", line.get("validation/student/frechet"))
        if value is not None:
            steps.append((float(line["step"]), float(value)))
    seconds = [(max((cpu for step, cpu in spent if step <= at), default=0.0), value) for at, value in steps]
    return steps, seconds


def chart(title: str, below: str, series: Series) -> str:
    """Curves as a file of their own: logarithmic height, a legend on the right."""
    points = [point for line in series.values() for point in line]
    labels = [f"{name} {short(line[-1][1])}" for name, line in series.items()]
    right = WIDTH - LEGEND
    width = max(WIDTH, right + 48 + LETTER * max(map(len, labels)))
    x = Axis.over([a for a, _ in points], LEFT, right)
    y = Axis.over([b for _, b in points], HEIGHT - BOTTOM, TOP, log=True)
    parts = [STYLE, *grid(x, y, right, right=0)]
    for index, (label, line) in enumerate(zip(labels, series.values(), strict=True)):
        style, at = series_class(index), TOP + 16 + 18 * index
        path = " ".join(f"{x(a)},{y(b)}" for a, b in thinned(line))
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        parts += [f'<circle class="dot {style}" cx="{x(a)}" cy="{y(b)}" r="2.5"/>' for a, b in line]
        parts.append(f'<line class="line {style}" x1="{right + 12}" x2="{right + 34}" y1="{at - 4}" y2="{at - 4}"/>')
        parts.append(f'<text x="{right + 40}" y="{at}">{escape(label)}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 8}" text-anchor="end">{escape(below)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 3}">{escape(title)}</text>')
    drawn = svg(title, parts, width, HEIGHT)
    return drawn.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" ', 1)


def write_curves(folders: Mapping[str, Path], images: Path) -> list[str]:
    """Both charts; the lines that show them, none without curves."""
    found = {name: curves(folder / "run") for name, folder in folders.items() if name != "teacher"}
    found = {name: both for name, both in found.items() if both[0]}
    if not found:
        return []
    lines = [
        "",
        "## Curves",
        "",
        "Validation while training: 64 prompts, 512 real videos, so the level is not that of the table.",
        "",
    ]
    for index, (file, below) in enumerate((("frechet-steps", "training step"), ("frechet-seconds", "CPU seconds"))):
        drawn = chart("Frechet distance", below, {name: both[index] for name, both in found.items()})
        (images / f"{file}.svg").write_text(drawn + "\n", encoding="utf-8")
        lines += [f"![Frechet distance against {below}](images/leaderboard/{file}.svg)", ""]
    return lines


def write_gallery(videos: Mapping[str, Mapping[str, Tensor]], images: Path) -> list[str]:
    """All models at 4 steps (the teacher at 50) on the same prompts: a row per model; the lines that show it."""
    rows = [torch.cat(list(v["50" if name == "teacher" else "4"]), dim=-1) for name, v in videos.items()]
    write_video(images / "gallery.gif", torch.cat(rows, dim=-2), scale=2)
    names = ", ".join("teacher (50 guided steps)" if name == "teacher" else name for name in videos)
    text = f"The same prompts and noise in every column; from top to bottom: {names}, at 4 steps."
    return ["## Gallery", "", text, "", "![Videos of every method](images/leaderboard/gallery.gif)", ""]


def given_of(arguments: Any) -> str:
    """Flags beside the budget that the figures depend on."""
    seeds = f" --seeds {' '.join(map(str, arguments.seeds))}" if arguments.seeds != (0,) else ""
    return seeds + (f" --prompts {arguments.prompts}" if arguments.prompts != 512 else "")


def write_page(
    arguments: Any,
    results: Sequence[Mapping[str, Any]],
    folders: Mapping[str, Path],
    videos: Mapping[str, Mapping[str, Tensor]],
    failed: Mapping[str, str],
    environment: Mapping[str, str],
) -> None:
    """The page at ``arguments.out``, ``results.json`` beside it and pictures below ``images/leaderboard``."""
    images = arguments.out.parent / "images" / "leaderboard"
    images.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(
        budget=arguments.budget,
        options=given_of(arguments),
        seeds=SEEDS.format(len(arguments.seeds)) if len(arguments.seeds) > 1 else "",
        prompts=arguments.prompts,
        revision=environment["revision"][:7],
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=environment["torch"],
        floor=results[0]["frechet_floor"],
    )
    teacher = [row for row in results if row["method"] == "teacher"]
    students = [row for row in results if row["method"] != "teacher"]
    columns = {name: form for name, form in COLUMNS.items() if name != "over_seeds" or len(arguments.seeds) > 1}
    lines = [head, "## Teacher, guided", "", *table([over_seeds([row]) for row in teacher], columns)]
    for steps in (4, 2, 1):
        rows = by_distance(by_method(students, steps))
        lines += ["", f"## {steps} step{'s' if steps > 1 else ''}", "", *table(rows, columns)]
    lines += ["", "## Cost of the training", ""]
    lines += table(by_method(students, 4), {"method": "{}", **COST})
    lines += write_curves(folders, images) + write_gallery(videos, images)
    lines += ["## Methods", ""]
    for name in folders:
        if name != "teacher":
            what, paper = split_paper(load_method(name).summary)
            link = f" ([{paper}](https://arxiv.org/abs/{paper}))" if paper != "-" else ""
            lines.append(f"* `{name}`: {what}{link}")
    lines += [
        "",
        *(f"Not measured: `{name}`: {why}" for name, why in failed.items()),
        *([arguments.remark] * bool(arguments.remark)),
    ]
    arguments.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    plain = json.dumps(list(results), indent=2)
    arguments.out.with_suffix(".json").write_text(plain + "\n", encoding="utf-8")
