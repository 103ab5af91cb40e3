"""A run's folder as the report sees it: figures, videos, curves, config, environment; each as far as it is there."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastvideo.errors import UserError
from fastvideo.evaluation.charts import Point, read_curves, read_records
from fastvideo.evaluation.figures import COLUMNS, row_names
from fastvideo.evaluation.report_store import METRICS, Gallery, read_gallery, read_object

CURVES, HEALTH, CONFIG, ENVIRONMENT = "metrics.jsonl", "health.jsonl", "config.yaml", "environment.json"
MADE_BY = "one is made by `fastvideo distill`, `fastvideo evaluate --out FOLDER` or the demo"
ROW_KEYS = (
    *(column.key for column in COLUMNS),
    *("intervals", "counts", "samples", "network_calls", "steps", "guidance", "sampler", "batch_size"),
    *("frechet_floor", "frechet_pixel_floor", "denoise_seconds_per_video", "end_to_end_seconds_per_video"),
)
MEASURED_WITH = ("prompts", "seed", "split", "reference_videos", "prompts_sha256", "judge_sha256")
"""Settings of an evaluation that figures must share to stand side by side."""


@dataclass(frozen=True)
class Run:
    """What one page or one column shows.

    Attributes:
        name: what the run is called on the page.
        folder: where it lies.
        metrics: the object in ``metrics.json``; empty if the run was not measured.
        gallery: the kept videos, if there are any.
        curves: points by metric name.
        health: what each validation found, in order: ``step`` and ``alarms``.
        config: the resolved YAML text, or nothing.
        environment: versions and machine.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any] = field(default_factory=dict)
    gallery: Gallery | None = None
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
        """Method and family, such as "DMD2 x WAN"."""
        values = self.settings
        names = [str(values[key]).upper() for key in ("distill_method", "distill_model") if key in values]
        return " \u00d7 ".join(names)

    @property
    def measurement(self) -> tuple[Any, ...]:
        """What figures must share to stand side by side: prompts, noise, judge and reference videos."""
        settings = self.metrics.get("evaluation", {})
        return tuple(
            settings.get(key)
            for key in ("prompts", "seed", "split", "reference_videos", "prompts_sha256", "judge_sha256")
        )


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run's folder.

    Raises:
        UserError: if it does not exist, is no run, or a file in it is damaged.
    """
    _check_is_run(folder)
    metrics = read_object(folder / METRICS) if (folder / METRICS).is_file() else {}
    if metrics:
        _check_metrics(folder / METRICS, metrics)
    environment = folder / ENVIRONMENT
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=metrics,
        gallery=read_gallery(folder),
        curves=_read_curves(folder / CURVES),
        health=_read_health(folder / HEALTH),
        config=_read_config(folder / CONFIG),
        environment=read_object(environment) if environment.is_file() else {},
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, called by the shortest ends of their paths that tell them apart.

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
        siblings = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        near = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
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


def _read_curves(path: Path) -> dict[str, list[Point]]:
    if not path.is_file():
        return {}
    try:
        return read_curves(path)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: every line must be a JSON object with a step: {error}") from error


def _read_health(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return read_records(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: every line must be a JSON object: {error}") from error


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
