"""``docs/time-to-quality.md``: a table and curves of what ``time_to_quality.py`` measured, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from leaderboard_page import chart, table

from fastvideo.errors import UserError

Row = Mapping[str, Any]
COLUMNS = {
    "method": "{}",
    "changes": "{}",
    "seeds": "{}",
    "updates": "{:.0f}",
    "weights": "{}",
    "frechet 4": "{}",
    "frechet 2": "{}",
    "frechet 1": "{}",
    "pixel 4": "{:.0f}",
    "pixel 1": "{:.0f}",
    "digit 4": "{:.3f}",
    "digit 1": "{:.3f}",
}
HEAD = """# Quality against training time

Made by `python benchmarks/time_to_quality.py --page` from what was measured before: one line per method and changes of
its recipe on the tiny world, after {mark} CPU seconds of training steps on one thread. `python
benchmarks/time_to_quality.py METHOD --seed SEED --set CHANGES` makes a row. Time is the CPU time of training steps, so
neither other work on the machine nor measuring costs a run anything; preparation counts (see [results](results.md)).
Distances are Frechet distances of {prompts} held-out prompts, at 4, 2 and 1 steps, with the 95 % interval over prompts;
of several seeds the mean, with the lowest and the highest.

Settings are not chosen by this page: that is what `--split train` is for.
"""


def collected(runs: Path) -> list[dict[str, Any]]:
    """Rows of held-out prompts of all runs with their method, seed and changes, at the largest number of prompts.

    Raises:
        UserError: if there are none.
    """
    rows = [row for file in sorted(runs.glob("*/figures.jsonl")) for row in _rows(file)]
    if not rows:
        raise UserError(f"{runs}: nothing is measured on held-out prompts yet; run a method first")
    most = max(row["prompts"] for row in rows)
    return [row for row in rows if row["prompts"] == most]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    known = json.loads((file.parent / "training.json").read_text())["identity"]
    named = {"method": known["method"], "seed": known["seed"], "changes": " ".join(known["settings"])}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "heldout":
            yield {**named, **row}


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by method, changes and weights, in that order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["changes"], row["weights"]), []).append(row)
    return dict(sorted(found.items()))


def interval(rows: Sequence[Row], figure: str) -> str:
    """A figure with its interval: over prompts for one seed, over seeds for several."""
    values = [row[figure]["value"] for row in rows]
    low, high = (rows[0][figure][end] for end in ("low", "high")) if len(rows) == 1 else (min(values), max(values))
    return f"{mean(values):.2f} ({low:.2f} to {high:.2f})"


def line_of(key: tuple[str, str, str], rows: Sequence[Row], mark: int) -> dict[str, Any] | None:
    """One line of the table; ``None`` if a number of steps is missing at the mark."""
    method, changes, weights = key
    by_steps = {steps: [row for row in rows if row["mark"] == mark and row["steps"] == steps] for steps in (4, 2, 1)}
    if not all(by_steps.values()):
        return None
    line: dict[str, Any] = {"method": method, "changes": changes or "none", "weights": weights}
    line["seeds"] = len(by_steps[4])
    line["updates"] = mean(row["updates"] for row in by_steps[4])
    for steps, some in by_steps.items():
        line[f"frechet {steps}"] = interval(some, "frechet")
        line[f"pixel {steps}"] = mean(row["frechet_pixel"]["value"] for row in some)
        line[f"digit {steps}"] = mean(row["digit_accuracy"]["value"] for row in some)
    return line


def curve(rows: Sequence[Row], steps: int) -> list[tuple[float, float]]:
    """Frechet distance at each mark, the mean over seeds."""
    marks = sorted({row["mark"] for row in rows if row["steps"] == steps})
    at = {mark: [r["frechet"]["value"] for r in rows if r["mark"] == mark and r["steps"] == steps] for mark in marks}
    return [(float(mark), mean(values)) for mark, values in at.items()]


def write_page(runs: Path, out: Path) -> None:
    """Write the page, its curves and its figures.

    Raises:
        UserError: if nothing is measured.
    """
    rows = collected(runs)
    mark, grouped = max(row["mark"] for row in rows), groups(rows)
    lines = [HEAD.format(mark=mark, prompts=rows[0]["prompts"])]
    found = [line for key, some in grouped.items() if (line := line_of(key, some, mark))]
    lines += table(found, COLUMNS)
    images = out.parent / "images" / "time_to_quality"
    images.mkdir(parents=True, exist_ok=True)
    averaged = {
        " ".join(part for part in key[:2] if part): some for key, some in grouped.items() if key[2] == "averaged"
    }
    for steps in (4, 2, 1):
        series = {name: points for name, some in averaged.items() if len(points := curve(some, steps)) > 1}
        if series:
            name = f"frechet-{steps}.svg"
            title = f"Frechet distance at {steps} steps, averaged weights"
            (images / name).write_text(chart(title, "CPU seconds of training", series) + "\n", encoding="utf-8")
            lines += ["", f"![{title}, against CPU seconds](images/time_to_quality/{name})"]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(out)
