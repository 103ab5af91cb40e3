"""What a measured run keeps so that its page can be made again: figures, and the first videos as files.

``RUN/metrics.json`` holds the figures, ``RUN/videos`` a folder per row with one file per prompt (lossless ``.apng`` for
small videos, ``.mp4`` for large ones) and ``index.json``, which names prompts, frame rate and folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo.data.video_io import FORMATS, FPS, video_bytes
from fastvideo.errors import UserError
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.files import replace_file, replacing_folder

METRICS, VIDEOS, INDEX = "metrics.json", "videos", "index.json"
TINY = 128
"""Pixels of height up to which videos are kept losslessly; the browser enlarges them."""


@dataclass(frozen=True)
class Clip:
    """One video file: its bytes and its suffix, ``.apng`` or ``.mp4``."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class Gallery:
    """The first videos of every row, one per prompt, all from the same noise."""

    prompts: tuple[str, ...]
    rows: Mapping[str, tuple[Clip, ...]]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``values`` as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(values, indent=2) + "\n")


def check_unmeasured(run: Path) -> None:
    """Refuse a place that cannot take figures, before time is spent on them.

    Raises:
        UserError: if ``run`` is a file, or holds figures already.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run}: a folder, or a file name that ends in .json, is expected, and this is a file")
    if (run / METRICS).exists():
        raise UserError(f"--out {run} holds figures already ({METRICS}): choose another folder, or delete that file")
    _check_videos(run / VIDEOS)


def _check_videos(folder: Path) -> None:
    """Refuse to replace a folder that no evaluation made."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise UserError(f"{folder} is in the way of the videos that are kept, and was not made by an evaluation")


def save_measured(run: Path, evaluation: Evaluation, **more: object) -> dict[str, Any]:
    """Keep an evaluation in ``run``, with further top-level keys of ``metrics.json``, which is written last.

    Returns:
        The object in ``metrics.json``.
    """
    _save_videos(run / VIDEOS, evaluation)
    figures = {**evaluation.to_dict(), **more}
    write_json(run / METRICS, figures)
    return figures


def _save_videos(folder: Path, evaluation: Evaluation) -> None:
    _check_videos(folder)
    names = {name: f"{i:02}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[-60:]}" for i, name in enumerate(evaluation.videos)}
    with replacing_folder(folder) as part:
        for name, videos in evaluation.videos.items():
            _save_row(part / names[name], videos)
        write_json(part / INDEX, {"fps": FPS, "prompts": list(evaluation.prompts), "rows": names})


def _save_row(folder: Path, videos: Tensor) -> None:
    folder.mkdir(parents=True)
    suffix = ".apng" if videos.shape[-2] <= TINY else ".mp4"
    for number, video in enumerate(videos):
        (folder / f"{number:03}{suffix}").write_bytes(video_bytes(video, suffix, FPS))


def read_gallery(run: Path) -> Gallery | None:
    """The kept videos of a run; ``None`` if it kept none.

    Raises:
        UserError: if the index cannot be read, or names what is not there.
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


def _read_row(folder: Path, place: str, count: int) -> tuple[Clip, ...]:
    if Path(place).name != place:
        raise UserError(f"{folder / INDEX}: {place!r} is not the name of a folder in {folder}")
    files = sorted(path for path in (folder / place).glob("*") if path.suffix in FORMATS)
    if len(files) != count:
        raise UserError(f"{folder / place}: {count} videos are expected, one per prompt, and {len(files)} are there")
    return tuple(Clip(path.read_bytes(), path.suffix) for path in files)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: if it holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, got {type(values).__name__}")
    return values
