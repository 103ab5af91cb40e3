"""A run's folder as frozen values: figures, videos, curves, health, config and environment, each as far as present."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastvideo.errors import UserError
from fastvideo.evaluation.measuring import measuring_command
from fastvideo.wording import counted, nearest, title_of

METRICS, VIDEOS, INDEX = "metrics.json", "videos", "index.json"
CURVES, HEALTH, CONFIG, ENVIRONMENT = "metrics.jsonl", "health.jsonl", "config.yaml", "environment.json"
VALIDATION = "validation"
MADE_BY = "one is made by `fastvideo distill`, `fastvideo evaluate --out FOLDER` or the demo"
MIME = {".apng": "image/apng", ".mp4": "video/mp4"}
"""Media types of the videos that a run keeps, by suffix."""
SMALL = 128
"""Pixels of height up to which videos are kept losslessly; the page enlarges them without smoothing."""
ROW_KEYS = (
    *("intervals", "counts", "samples", "network_calls", "steps", "guidance", "sampler", "batch_size"),
    *("denoise_seconds_per_video", "end_to_end_seconds_per_video"),
)
"""Keys of every row besides its figures, see :class:`fastvideo.evaluation.metrics.SampledRow`."""
NOTES = ("evaluation", "students", "distillation", "families", "goals")
"""Keys of ``metrics.json`` that are no rows."""
MEASURED_WITH = (
    *("prompts", "seed", "split", "reference_videos", "prompts_sha256", "judge_sha256"),
    *("frames", "switches", "reference_windows"),
    *("teacher_key", "metrics", "data", "data_videos"),
)
"""Settings of an evaluation that runs with comparable figures share."""
Point = tuple[float, float]
"""Step and value."""


@dataclass(frozen=True)
class VideoFile:
    """A video's bytes and its suffix, ``.apng`` or ``.mp4``."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class Gallery:
    """The first videos of every row, one per prompt, all from the same noise."""

    prompts: tuple[str, ...]
    rows: Mapping[str, tuple[VideoFile, ...]]


@dataclass(frozen=True)
class Validation:
    """The videos of the last validation by name (``student``, ``x0``, ...), and the teacher's; several side by side."""

    step: int
    videos: Mapping[str, VideoFile]


@dataclass(frozen=True)
class Run:
    """One run on the page.

    Attributes:
        name: the run's name on the page.
        folder: the run's folder.
        metrics: the object in ``metrics.json``; empty if the run was not measured.
        student: the recipe of the run's result; empty without one.
        gallery: the kept videos, if any.
        validation: the videos of the last validation, if any.
        curves: points by metric name.
        health: one object per validation, in order: ``step``, ``alarms``, figures of ``student`` and reference.
        config: the resolved YAML text; empty without one.
        environment: versions and machine.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    gallery: Gallery | None = None
    validation: Validation | None = None
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    health: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The config's values; empty without one."""
        return yaml.safe_load(self.config) or {}

    @property
    def recipe(self) -> str:
        """Method and family, such as "DMD2 x WAN", or the class of one's own."""
        values = self.settings
        names = [title_of(str(values[key])) for key in ("distill_method", "distill_model") if key in values]
        return " \u00d7 ".join(names)

    @property
    def measuring(self) -> str:
        """The command that measures this run's student and keeps the figures with it."""
        student = measuring_command(shlex.quote(f"{self.folder}/student"), self.settings.get("model", {}))
        return f"{student} --out {shlex.quote(str(self.folder))}"

    @property
    def mismatch(self) -> str:
        """:func:`mismatch` among the figures, with the way to those of the run's student."""
        found = mismatch(self.metrics, self.student)
        return found and f"{found} For its own, delete {METRICS} and measure again: {self.measuring}"

    @property
    def measurement(self) -> tuple[Any, ...]:
        """The values of ``MEASURED_WITH``."""
        settings = self.metrics.get("evaluation", {})
        return tuple(settings.get(key) for key in MEASURED_WITH)


def row_names(metrics: Mapping[str, Any]) -> list[str]:
    """The keys of ``metrics.json`` that are rows, in order."""
    return [name for name, value in metrics.items() if isinstance(value, Mapping) and name not in NOTES]


def mismatch(metrics: Mapping[str, Any], recipe: Mapping[str, Any], folder: str = "student") -> str:
    """The sentence for figures that are not of the student that they stand with, or may not be; empty if they are.

    Args:
        metrics: the object in ``metrics.json``.
        recipe: the student's.
        folder: the student's, in the run's.
    """
    if not metrics or "steps" not in recipe:
        return ""
    own = trained(recipe)
    if "students" not in metrics:
        return (
            f"{METRICS} names no step, as an earlier version wrote it: its figures may not be of this student, {own}."
        )
    theirs = [trained(one) for one in metrics["students"].values() if one["folder"] == folder]
    if own in theirs:
        return ""
    return f"The figures in {METRICS} are of {theirs[0] if theirs else 'other models'}, and this student is {own}."


def trained(recipe: Mapping[str, Any]) -> str:
    """A student in words: kind of weights and steps of training."""
    kind = {"ema": "averaged weights", "live": "last weights"}.get(recipe.get("weights") or "", "weights")
    steps = counted(recipe["steps"], "step") if "steps" in recipe else "some steps"
    return f"the {kind} after {steps} of training"


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run's folder.

    Raises:
        UserError: if it does not exist, is not a run, or holds a damaged file.
    """
    _check_is_run(folder)
    metrics = read_object(folder / METRICS)
    if metrics:
        _check_metrics(folder / METRICS, metrics)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=metrics,
        student=read_object(folder / "student" / "recipe.json"),
        gallery=read_gallery(folder),
        validation=read_validation(folder / VALIDATION),
        curves=read_curves(folder / CURVES),
        health=_read_lines(folder / HEALTH),
        config=_read_config(folder / CONFIG),
        environment=read_object(folder / ENVIRONMENT),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, named by the shortest distinct ends of their paths.

    Raises:
        UserError: as :func:`read_run`, or if a folder is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{folder} is given twice")
    return [read_run(folder, name) for folder, name in zip(folders, _short_names(resolved), strict=True)]


def _short_names(places: Sequence[Path]) -> list[str]:
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _is_run(folder: Path) -> bool:
    started = (folder / CONFIG).is_file() and (folder / ENVIRONMENT).is_file()
    return started or (folder / METRICS).is_file() or (folder / CURVES).is_file()


def _check_is_run(folder: Path) -> None:
    if not folder.exists():
        near = nearest(folder.name, sorted(path.name for path in folder.parent.glob("*") if path.is_dir()))
        hint = f"; did you mean {folder.parent / near}?" if near else ""
        raise UserError(f"run folder {folder} does not exist{hint}")
    if not _is_run(folder):
        inside = next((parent for parent in folder.resolve().parents if _is_run(parent)), None)
        hint = f"; it lies in the run {inside}" if inside else f"; {MADE_BY}"
        raise UserError(f"{folder} is no run: it has no {METRICS}, no {CURVES} and no {CONFIG}{hint}")


def _check_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    names = row_names(metrics)
    if not names:
        raise UserError(f"{path} holds no row of figures")
    for name in names:
        missing = [key for key in ROW_KEYS if key not in metrics[name]]
        if missing:
            raise UserError(f"{path}: row {name!r} lacks {', '.join(missing)}; was it written by another version?")


def read_curves(path: Path) -> dict[str, list[Point]]:
    """Read ``(step, value)`` of every finite metric of a ``metrics.jsonl``; empty without one.

    Raises:
        UserError: for a line that is not a JSON object with a step, except an incomplete last line.
    """
    curves: dict[str, list[Point]] = {}
    for record in _read_lines(path, required="step"):
        for name, value in record.items():
            if name not in ("step", "time", "seconds") and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((float(record["step"]), float(value)))
    return curves


def _read_lines(path: Path, required: str = "") -> list[dict[str, Any]]:
    """The objects of a file with one per line; an incomplete last line is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    needs = f" with a {required}" if required else ""
    try:
        records = [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: every line must be a JSON object{needs}: {error}") from error
    with suppress(json.JSONDecodeError):
        records += [json.loads(line) for line in lines[-1:]]
    if any(not isinstance(record, dict) or (required and required not in record) for record in records):
        raise UserError(f"{path}: every line must be a JSON object{needs}")
    return records


def _read_config(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: keys and values are expected")
    return text


def read_gallery(run: Path) -> Gallery | None:
    """Read the kept videos of a run; ``None`` if it kept none.

    Raises:
        UserError: if the index cannot be read, or names missing files.
    """
    folder = run / VIDEOS
    if not (folder / INDEX).is_file():
        return None
    index = read_object(folder / INDEX)
    try:
        prompts = tuple(str(prompt) for prompt in index["prompts"])
        rows = {name: _read_row(folder, str(place), len(prompts)) for name, place in index["rows"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: prompts (a list) and rows (an object) are expected: {error}") from error
    return Gallery(prompts, rows)


def _read_row(folder: Path, place: str, count: int) -> tuple[VideoFile, ...]:
    if Path(place).name != place:
        raise UserError(f"{folder / INDEX}: {place!r} is not the name of a folder in {folder}")
    files = sorted(path for path in (folder / place).glob("*") if path.suffix in MIME)
    if len(files) != count:
        raise UserError(f"{folder / place}: {count} videos are expected, one per prompt, and {len(files)} are there")
    return tuple(VideoFile(path.read_bytes(), path.suffix) for path in files)


def read_validation(folder: Path) -> Validation | None:
    """Read the videos of the last validation of a training, ``step-N-NAME.mp4``, and ``teacher.mp4``."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step-*.mp4")):
        if match := re.fullmatch(r"step-(\d+)-(\w+)", path.stem):
            found.setdefault(int(match[1]), {})[match[2]] = path
    if not found:
        return None
    last = max(found)
    paths = {**found[last], "teacher": folder / "teacher.mp4"}
    videos = {name: VideoFile(path.read_bytes(), path.suffix) for name, path in paths.items() if path.is_file()}
    return Validation(last, videos)


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty without one.

    Raises:
        UserError: if it holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, got {type(values).__name__}")
    return values
