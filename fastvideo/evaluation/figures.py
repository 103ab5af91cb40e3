"""Figures of measured runs as sentences and tables; `templates/` turns them into HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from fastvideo.distillation.config.base import by_time
from fastvideo.distillation.sample import guidance_text
from fastvideo.evaluation.catalogue import (
    DIGIT,
    FRECHET,
    LAST_FRECHET,
    RELATIVE,
    SPACE,
    STREAM,
    SWITCHES,
    WORLD,
    Figure,
    Metrics,
    distance_of,
    present,
)
from fastvideo.evaluation.charts import Mark, series_class
from fastvideo.evaluation.report_run import Run, row_names
from fastvideo.evaluation.tables import Cell, Line, Table

KINDS = {"teacher": "Teacher", "untrained": "Student before training", "student": "Student"}
STYLES = {"student": "student", "untrained": "baseline"}


class Difference(NamedTuple):
    """One figure minus another, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(row: Metrics, other: Metrics, key: str) -> Difference | None:
    """``row - other`` of a figure, from their two intervals; ``None`` if either is undefined.

    Combines the ends as for independent samples (Zou and Donner 2008, MOVER). Rows share prompts and noise, so a paired
    interval would be narrower: this one is conservative.
    """
    if row[key] is None or other[key] is None:
        return None
    a, b = row[key], other[key]
    (a_low, a_high), (b_low, b_high) = row["intervals"][key], other["intervals"][key]
    return Difference(a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low))


# Rows of one run


def kind_of(name: str, row: Metrics) -> str:
    """``teacher``, ``untrained`` or ``student`` from the row or its name; empty if unknown."""
    kind = str(row.get("kind") or name.rsplit("_", 1)[0])
    return kind if kind in KINDS else ""


def titles_of(metrics: Metrics) -> dict[str, str]:
    """Titles of all rows, such as "Teacher, 50 steps, guided"; equal ones are told apart by folder."""
    titles = {name: _title(name, metrics[name]) for name in row_names(metrics)}
    alike = {title: [name for name, other in titles.items() if other == title] for title in titles.values()}
    own = {name: short for names in alike.values() for name, short in zip(names, short_names(names), strict=True)}
    return {name: title if len(alike[title]) == 1 else own[name] for name, title in titles.items()}


def short_names(names: Sequence[str]) -> list[str]:
    """The part of each path that tells it from the others, such as "causvid" for ``outputs/causvid/student``."""
    paths = [PurePath(name).parts for name in names]
    while len({parts[-1] for parts in paths}) == 1 and min(map(len, paths)) > 1 and len(names) > 1:
        paths = [parts[:-1] for parts in paths]
    depth = 1
    while len({parts[-depth:] for parts in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(parts[-depth:]) for parts in paths]


def _title(name: str, row: Metrics) -> str:
    kind = kind_of(name, row)
    if not kind:
        return PurePath(name).name
    return f"{KINDS[kind]}, {steps_of(row)}{'' if row['guidance'] == 1.0 else ', guided'}"


def steps_of(row: Metrics) -> str:
    """Such as "4 steps"."""
    return "1 step" if row["steps"] == 1 else f"{row['steps']} steps"


def of_kind(metrics: Metrics, kind: str) -> list[Metrics]:
    """The rows of a kind, most network calls first."""
    rows = [metrics[name] for name in row_names(metrics) if kind_of(name, metrics[name]) == kind]
    return sorted(rows, key=lambda row: -int(row["network_calls"]))


def pair(metrics: Metrics) -> tuple[Metrics, Metrics] | None:
    """Teacher and student with the most calls; ``None`` unless both are unique."""
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
    calls = "network calls per chunk" if "series" in student else "network calls"
    return f"{student['network_calls']} {calls} instead of {teacher['network_calls']}: {faster:.0f}\u00d7 faster"


def lead(metrics: Metrics) -> str:
    """The price of the headline, in one sentence."""
    found = pair(metrics)
    if found is None:
        return "Each model on the same prompts and noise."
    teacher, student = found
    if "frechet_last" in student:
        return _lead_of_streams(teacher, student)
    if "frechet" not in student:
        return _lead_of_teacher(teacher, student)
    few = [row for row in of_kind(metrics, "teacher") if row["steps"] == student["steps"] and row is not teacher]
    in_few = f" and at {FRECHET.text(few[0]['frechet'])} with {steps_of(few[0])}" if few else ""
    guided = "" if teacher["guidance"] == 1.0 else " guided"
    return (
        f"The student's videos lie at a Fréchet distance of {FRECHET.text(student['frechet'])} from real ones, its "
        f"teacher's at {FRECHET.text(teacher['frechet'])} with {teacher['steps']}{guided} steps{in_few}; a perfect "
        f"model would score {FRECHET.text(student['frechet_floor'])}."
    )


def _lead_of_streams(teacher: Metrics, student: Metrics) -> str:
    """The main figures of streams."""
    ours, theirs, floor = (
        LAST_FRECHET.text(value)
        for value in (student["frechet_last"], teacher["frechet_last"], student["frechet_last_floor"])
    )
    return (
        f"In the last window the student's streams lie at a Fréchet distance of {ours} from real ones, its teacher's "
        f"at {theirs} with {teacher['steps']} steps; real streams through the VAE score {floor}."
    )


def _lead_of_teacher(teacher: Metrics, student: Metrics) -> str:
    """The main figures of a measurement without known truth."""
    said = {figure.key: figure for figure in present(student, RELATIVE)}
    parts = []
    if distance := said.get("fd_teacher"):
        floor = distance.text(student["fd_teacher_floor"])
        parts.append(
            f"The student's videos lie at a distance of {distance.text(student['fd_teacher'])} from its teacher's; "
            f"the teacher's own lie at {floor} from each other."
        )
    if match := said.get("prompt_match"):
        parts.append(
            f"The teacher finds the right prompt in {match.text(student['prompt_match'])} of the student's videos and "
            f"in {match.text(teacher['prompt_match'])} of its own."
        )
    return " ".join(parts) or "Figures of the student, relative to its teacher's."


def measured_on(metrics: Metrics) -> str:
    """The basis of the figures, such as "512 held-out prompts, seed 0"."""
    settings = metrics.get("evaluation", {})
    samples = metrics[row_names(metrics)[0]]["samples"]
    split = {"heldout": "held-out", "train": "training"}.get(settings.get("split"), "")
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    length = f", streams of {settings['frames']} frames" if "frames" in settings else ""
    return " ".join(filter(None, (str(samples), split, "prompts"))) + length + seed


def facts(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Name, value and note of the comparison's main numbers."""
    found = pair(metrics) if metrics else None
    if found is None:
        return []
    teacher, student = found
    distance = distance_of(student)
    items = [
        (
            distance_name(distance),
            distance.text(student[distance.key]),
            _direction(distance, distance.cell(student).small),
        )
    ]
    titles = {"digit_accuracy": "Right digit", "digit_last": "Right digit, last window", "prompt_match": "Right prompt"}
    for key, title in titles.items():
        if key in student:
            items.append((title, DIGIT.text(student[key]), f"teacher {DIGIT.text(teacher[key])}"))
    items.append(("Denoising one video", time_of(student), f"teacher {time_of(teacher)}"))
    run = metrics.get("distillation", {})
    if "wall_seconds" in run:
        updates = f"{run['student_updates']} student updates" if "student_updates" in run else ""
        items.append(("Distillation", duration(run["wall_seconds"]), updates))
    return items


def distance_name(distance: Figure) -> str:
    """The name of the distance by which models are compared."""
    names = {FRECHET: "Fréchet distance", LAST_FRECHET: "Fréchet distance, last window"}
    return names.get(distance, distance.head.capitalize())


def _direction(figure: Figure, interval: str) -> str:
    better = "nearer to 1" if figure.target else "lower" if figure.lower_is_better else "higher"
    return f"{interval}; {better} is better"


def facts_of_runs(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Name, distance and note of each run's student with the most calls."""
    items = []
    first = of_kind(runs[0].metrics, "student")
    for run in runs:
        students = of_kind(run.metrics, "student")
        if not students:
            continue
        distance = distance_of(students[0])
        note = f"{distance.head}, {steps_of(students[0])}"
        if first and run is not runs[0] and run.measurement == runs[0].measurement:
            delta = _delta(students[0], first[0], distance)
            note += f"; {delta.text} ({delta.small})" if delta.text else "; the same"
        items.append((run.name, distance.text(students[0][distance.key]), note))
    return items


def duration(seconds: float) -> str:
    return f"{seconds:.0f}{SPACE}s" if seconds < 100 else f"{seconds / 60:.1f}{SPACE}min"


def time_of(row: Metrics, key: str = "denoise_seconds_per_video") -> str:
    """Seconds or milliseconds per video."""
    seconds = row[key]
    return f"{seconds:.2f}{SPACE}s" if seconds >= 0.1 else f"{1000 * seconds:.1f}{SPACE}ms"


# Rows of several runs


@dataclass(frozen=True)
class Entry:
    """A row of a run on the page; ``shared`` if all runs of its group have the same figures there."""

    run: Run
    name: str
    title: str
    shared: bool = False

    @property
    def row(self) -> Metrics:
        return dict(self.run.metrics[self.name])

    @property
    def style(self) -> str:
        return STYLES.get(kind_of(self.name, self.row), "teacher")


@dataclass(frozen=True)
class Group:
    """Runs that were measured alike: same prompts, noise and reference videos."""

    runs: tuple[Run, ...]

    @property
    def metrics(self) -> Metrics:
        return self.runs[0].metrics

    @property
    def first(self) -> Metrics:
        return dict(self.metrics[row_names(self.metrics)[0]])

    def sections(self) -> list[list[Entry]]:
        """Rows of one title together, in the order of the runs; figures that all runs share appear once."""
        found: dict[str, list[Entry]] = {}
        for run in self.runs:
            for name, title in titles_of(run.metrics).items():
                found.setdefault(title, []).append(Entry(run, name, title))
        return [self._merged(entries) for entries in found.values()]

    def _merged(self, entries: list[Entry]) -> list[Entry]:
        first = entries[0]
        figures = present(first.row)
        same = all(entry.row.get(figure.key) == first.row[figure.key] for entry in entries for figure in figures)
        whole = len(entries) == len(self.runs) > 1
        return [Entry(first.run, first.name, first.title, shared=True)] if same and whole else entries

    def entries(self) -> list[Entry]:
        return [entry for section in self.sections() for entry in section]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The measured runs, those measured alike together, in order of appearance."""
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.metrics:
            found.setdefault(run.measurement, []).append(run)
    return [Group(tuple(members)) for members in found.values()]


def figures_tables(groups: Sequence[Group], several: bool) -> dict[str, Table]:
    """All rows of all groups, with the differences between ``several`` runs, by kind.

    Kinds are ``world``, ``relative``, ``stream`` and ``switches``.
    """
    kinds = {"world": WORLD, "relative": RELATIVE, "stream": STREAM, "switches": SWITCHES}
    found = {kind: _figures_table(groups, several, figures) for kind, figures in kinds.items()}
    return {kind: table for kind, table in found.items() if table is not None}


def _figures_table(groups: Sequence[Group], several: bool, kind: Sequence[Figure]) -> Table | None:
    """The rows of the groups that hold any of a kind's figures; ``None`` if none does."""
    groups = [group for group in groups if present(group.first, kind)]
    if not groups:
        return None
    held = {figure.key for group in groups for figure in present(group.first, kind)}
    figures = [figure for figure in kind if figure.key in held]
    single, first = len(groups) == 1, groups[0].first
    counted = [Cell(figure.head, f"n = {first['counts'][figure.key]}" if single else "") for figure in figures]
    heads = [Cell("model"), Cell("calls"), *counted, Cell("denoising"), Cell("end to end")]
    lines = [[*([] if single else [_basis(group)]), *_group_lines(group, figures, several)] for group in groups]
    return Table("figures" if len(figures) <= len(WORLD) else "figures dense", heads, lines)


def _basis(group: Group) -> Line:
    names = ", ".join(run.name for run in group.runs)
    return Line(Cell(f"Measured on {measured_on(group.metrics)}: {names}"), (), "group")


def _group_lines(group: Group, figures: Sequence[Figure], several: bool) -> list[Line]:
    lines = []
    for section in group.sections():
        for entry in section:
            lines.append(_figures_line(entry, section, figures, several))
            if entry is not section[0]:
                lines.append(_difference_line(entry, section[0], figures))
    floors = [Cell(f.text(group.first[f.floor]) if f.floor in group.first else "") for f in figures]
    if not any(figure.floor for figure in figures):
        return lines
    title = Cell("Real videos through the VAE", "floor: a perfect model, same sample size")
    if figures[0] in RELATIVE:
        title = Cell("Floor or chance", "the teacher from half to half of the prompts; a blind guess")
    return [*lines, Line(title, [Cell(), *floors, Cell(), Cell()], "floor-row")]


def _figures_line(entry: Entry, section: Sequence[Entry], figures: Sequence[Figure], several: bool) -> Line:
    row = entry.row
    who = ("all runs; " if entry.shared else f"{entry.run.name}; ") if several else ""
    guidance = "no guidance" if row["guidance"] == 1.0 else f"guidance {guidance_text(by_time(row['guidance']))}"
    calls = [other.row["network_calls"] for other in section]
    fewest = len(set(calls)) > 1 and row["network_calls"] == min(calls)
    cells = [Cell(str(row["network_calls"]), style="best" if fewest else "")]
    cells += [_figure_cell(entry, section, figure) for figure in figures]
    cells += [Cell(time_of(row)), Cell(time_of(row, "end_to_end_seconds_per_video"))]
    style = f"{entry.style}{' group-first' if several and entry is section[0] else ''}"
    return Line(Cell(entry.title, f"{who}{guidance}, {row['sampler']}"), cells, style)


def _figure_cell(entry: Entry, section: Sequence[Entry], figure: Figure) -> Cell:
    """A figure with its interval, marked if it is the best of its section."""
    if figure.key not in entry.row:
        return Cell()
    cell, value = figure.cell(entry.row), entry.row[figure.key]
    values = [figure.rounded(other.row[figure.key]) for other in section if other.row[figure.key] is not None]
    if value is None or len(set(values)) < 2:
        return cell
    best = min(values, key=figure.badness)
    return cell._replace(style="best") if figure.rounded(value) == best else cell


def _difference_line(entry: Entry, first: Entry, figures: Sequence[Figure]) -> Line:
    cells = [_delta(entry.row, first.row, figure) for figure in figures]
    return Line(Cell("", f"{entry.run.name} minus {first.run.name}"), [Cell(), *cells, Cell(), Cell()], "difference")


def _delta(row: Metrics, first: Metrics, figure: Figure) -> Cell:
    found = difference(row, first, figure.key)
    if found is None:
        return Cell()
    if row[figure.key] == first[figure.key]:
        return Cell("", "the same")
    style = "sure" if found.sure else ""
    return Cell(figure.text(found.value, True), figure.interval(found.low, found.high, True), style)


def verdicts(metrics: Metrics) -> Table | None:
    """Each student against its alternatives; ``None`` without any."""
    groups = [_verdict_lines(metrics, name) for name in row_names(metrics) if _alternatives(metrics, name)]
    if not groups:
        return None
    distance = distance_of(metrics[row_names(metrics)[0]]).head
    heads = [Cell(head) for head in ("model", "calls", distance, "difference", "the student is")]
    return Table("verdicts", heads, groups)


def _alternatives(metrics: Metrics, student: str) -> list[str]:
    """For a student: the teacher with the most steps, and other rows with as many steps as the student."""
    if kind_of(student, metrics[student]) != "student":
        return []
    most = max((row["network_calls"] for row in of_kind(metrics, "teacher")), default=0)
    kinds = {name: kind_of(name, metrics[name]) for name in row_names(metrics)}
    alike = [name for name in kinds if metrics[name]["steps"] == metrics[student]["steps"]]
    full = [name for name, kind in kinds.items() if kind == "teacher" and metrics[name]["network_calls"] == most]
    return [name for name, kind in kinds.items() if kind in ("teacher", "untrained") and name in {*alike, *full}]


def _verdict_lines(metrics: Metrics, name: str) -> list[Line]:
    """The student's own line, then one line per alternative."""
    titles, student = titles_of(metrics), metrics[name]
    own = [Cell(str(student["network_calls"])), distance_of(student).cell(student), Cell(), Cell()]
    others = [_verdict(student, titles[other], metrics[other]) for other in _alternatives(metrics, name)]
    return [Line(Cell(titles[name]), own, "student"), *others]


def _verdict(student: Metrics, title: str, other: Metrics) -> Line:
    distance = distance_of(student)
    found = difference(student, other, distance.key)
    assert found is not None, "a distance is always defined"
    real = distance in (FRECHET, LAST_FRECHET)
    better, worse = ("closer to real videos", "further away") if real else ("better", "worse")
    sign = distance.badness(student[distance.key]) - distance.badness(other[distance.key])
    word = "not told apart" if not found.sure else better if sign < 0 else worse
    delta = Cell(distance.text(found.value, True), distance.interval(found.low, found.high, True))
    cells = [Cell(str(other["network_calls"])), distance.cell(other), delta]
    return Line(Cell(f"instead of {title}"), [*cells, Cell(word, style="verdict sure" if found.sure else "verdict")])


def marks(group: Group, runs: Sequence[Run]) -> list[Mark]:
    """Each row as a point of the cost chart: coloured by kind for one run, by run for several."""
    result = []
    for entry in group.entries():
        row, kind = entry.row, kind_of(entry.name, entry.row)
        guided = kind == "teacher" and row["guidance"] != 1.0
        plain = kind and entry.title == _title(entry.name, row)
        label = steps_of(row) if plain else PurePath(entry.title).name
        style, meaning = entry.style, KINDS[kind] + (", guided" if guided else "") if kind else "Model"
        if len(runs) > 1:
            style = "teacher" if entry.shared else series_class(runs.index(entry.run))
            meaning = "the same in all runs" if entry.shared else entry.run.name
            label = steps_of(row)
        distance = distance_of(row)
        low, high = row["intervals"][distance.key]
        result.append(Mark(label, row["network_calls"], row[distance.key], low, high, style, meaning))
    return result
