"""Store a measured run for later pages: figures, and the first videos as files.

``RUN/metrics.json`` holds the figures, ``RUN/videos`` a folder per row with one file per prompt (lossless ``.apng`` for
small videos, ``.mp4`` for large ones) and ``index.json``, which names prompts, frame rate and folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo.data.video_io import FPS, video_bytes
from fastvideo.errors import UserError
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.report_run import INDEX, METRICS, SMALL, VIDEOS, read_object
from fastvideo.files import replace_file, replacing_folder


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(values, indent=2) + "\n")


def check_unmeasured(run: Path) -> None:
    """Refuse an output folder that cannot take figures.

    Raises:
        UserError: if ``run`` is a file, or holds figures already.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run}: a folder, or a file name that ends in .json, is expected, and this is a file")
    if (run / METRICS).exists():
        raise UserError(f"--out {run} holds figures already ({METRICS}): choose another folder, or delete that file")
    _check_videos(run / VIDEOS)


def check_measurable(run: Path) -> None:
    """Refuse an output folder that cannot take figures against a teacher; earlier ones of that kind are replaced.

    Raises:
        UserError: if ``run`` is a file, or holds figures of another kind.
    """
    if "teacher" not in read_object(run / METRICS).get("evaluation", {}):
        check_unmeasured(run)


def _check_videos(folder: Path) -> None:
    """Refuse to replace a folder that no evaluation made."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds something else than the videos of an evaluation: move it away")


def save_measured(run: Path, evaluation: Evaluation[Any], **more: object) -> dict[str, Any]:
    """Store an evaluation in ``run``, with further top-level keys in ``metrics.json``, which is written last.

    Returns:
        The object in ``metrics.json``.
    """
    _save_videos(run / VIDEOS, evaluation)
    students = {name: {**one, "folder": _inside(run, one["folder"])} for name, one in evaluation.students.items()}
    figures = {**evaluation.to_dict(), "students": students, **more}
    write_json(run / METRICS, figures)
    return figures


def _inside(run: Path, folder: str) -> str:
    """The path of a model's folder in that of a run; outside of it, as it is."""
    place, root = Path(folder).resolve(), run.resolve()
    return str(place.relative_to(root)) if place.is_relative_to(root) else folder


def _save_videos(folder: Path, evaluation: Evaluation[Any]) -> None:
    _check_videos(folder)
    names = {name: f"{i:02}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[-60:]}" for i, name in enumerate(evaluation.videos)}
    with replacing_folder(folder) as part:
        for name, videos in evaluation.videos.items():
            _save_row(part / names[name], videos)
        write_json(part / INDEX, {"fps": FPS, "prompts": list(evaluation.prompts), "rows": names})


def _save_row(folder: Path, videos: Tensor) -> None:
    folder.mkdir(parents=True)
    suffix = ".apng" if videos.shape[-2] <= SMALL else ".mp4"
    for number, video in enumerate(videos):
        (folder / f"{number:03}{suffix}").write_bytes(video_bytes(video, suffix, FPS))
