"""The committed figures of the tiny world: the demo with several training seeds, as one table.

python benchmarks/tiny_figures.py --seeds 0 1 2

Seeds that are measured already (OUT/seed-N/metrics.json) are not run again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROWS = ("teacher_50", "teacher_4", "teacher_1", "untrained_4", "student_4", "student_1")
FIGURES = {
    "network_calls": "{:.0f}",
    "digit_accuracy": "{:.3f}",
    "colour_accuracy": "{:.3f}",
    "direction_accuracy": "{:.3f}",
    "frechet": "{:.2f}",
    "frechet_pixel": "{:.0f}",
    "diversity": "{:.2f}",
}


@dataclass(frozen=True)
class Arguments:
    """Measure the tiny world's recipe over training seeds and write the page of results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; prompts and evaluation noise stay the same."""
    runs: Path = Path("outputs/figures")
    """Where the runs go."""
    out: Path = Path("docs/tiny-figures.md")
    """The page."""
    remark: str = ""
    """A sentence on the circumstances, for the foot of the page."""


def measure(seed: int, runs: Path) -> dict[str, Any]:
    """The demo's figures with this training seed."""
    folder = runs / f"seed-{seed}"
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, "-m", "fastvideo.demo", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True)
    return dict(json.loads((folder / "metrics.json").read_text()))


def cell(values: list[float], form: str) -> str:
    """The mean, with the range over seeds where they differ."""
    mean, low, high = (form.format(v) for v in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Rows of the comparison, mean over seeds."""
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for row in ROWS:
        cells = [cell([f[row][name] for f in figures], form) for name, form in FIGURES.items()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def ratios(figures: list[dict[str, Any]]) -> list[str]:
    """What the distillation is judged by, each over seeds."""

    def ratio(name: str, above: str, below: str) -> str:
        return cell([f[above][name] / f[below][name] for f in figures], "{:.2f}")

    pairs = {
        "student_4 / teacher_50": ("student_4", "teacher_50"),
        "student_4 / teacher_4": ("student_4", "teacher_4"),
        "student_1 / teacher_1": ("student_1", "teacher_1"),
        "teacher_4 / teacher_50": ("teacher_4", "teacher_50"),
    }
    lines = ["| ratio | Frechet | pixel Frechet |", "|---|---|---|"]
    lines += [f"| {n} | {ratio('frechet', *p)} | {ratio('frechet_pixel', *p)} |" for n, p in pairs.items()]
    speed = ratio("denoise_seconds_per_video", "teacher_50", "student_4")
    seconds = cell([f["distillation"]["wall_seconds"] for f in figures], "{:.0f}")
    memory = cell([f["distillation"]["peak_rss_mb"] for f in figures], "{:.0f}")
    return [
        *lines,
        "",
        f"Denoising: the 4-step student is {speed} times as fast as the teacher's 50 guided steps, in the same run.",
        f"Distillation: {seconds} s wall time, {figures[0]['distillation']['student_updates']} student updates,",
        f"{memory} MiB peak memory.",
    ]


HEAD = """# Figures of the tiny recipe over seeds

Made by `python benchmarks/tiny_figures.py --seeds {seeds}` at revision {revision}, on {cores} cores ({machine}), fp32.
Mean over {count} training seeds, with the range; {samples} held-out prompts, the same prompts and noise for every row.
The teacher runs with its best guidance ({guidance:g}). Distances are Frechet distances from 2048 other real held-out
videos, in the judge's feature space and in a pixel space (48 principal components). As many real videos after the VAE,
which is what a perfect model of the latents would score, are at {frechet_floor:.2f} and {frechet_pixel_floor:.0f}. Each
row's bootstrap intervals are in its `metrics.json`.
"""


def page(arguments: Arguments, figures: list[dict[str, Any]]) -> str:
    """The whole page."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = HEAD.format(
        **figures[0]["teacher_50"],
        seeds=" ".join(map(str, arguments.seeds)),
        revision=subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        count=len(figures),
    )
    remark = ["", arguments.remark] if arguments.remark else []
    return "\n".join([head, *table(figures), "", *ratios(figures), *remark, ""])


def main() -> None:
    """Measure, then write."""
    arguments = tyro.cli(Arguments)
    figures = [measure(seed, arguments.runs) for seed in arguments.seeds]
    arguments.out.write_text(page(arguments, figures), encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
