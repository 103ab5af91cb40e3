"""A folder of videos and their captions: from a CSV or JSONL file, or from a ``.txt`` beside each video."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastvideo.data.stills import IMAGE_SUFFIXES
from fastvideo.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".gif", ".mkv", ".avi", ".m4v", *IMAGE_SUFFIXES)
"""Videos, and images, which are videos of one frame."""
CAPTION_FILES = ("captions.csv", "captions.jsonl")
"""Default caption files, in the folder of videos."""
NAME_KEYS, CAPTION_KEYS = ("file_name", "file", "video", "path"), ("caption", "text", "prompt")
SHOWN = 3
"""Most wrong entries in a message."""


@dataclass(frozen=True)
class Video:
    """A file, its name relative to the folder (with ``/``), and its caption or the reason for having none."""

    path: Path
    name: str
    caption: str = ""
    problem: str | None = None


def find_videos(folder: Path, captions: Path | None = None) -> list[Video]:
    """All videos in ``folder`` and below, by name, each with its caption.

    Args:
        folder: searched with its subfolders.
        captions: a CSV file with a header or a JSONL file. Default: one of :data:`CAPTION_FILES` in the folder, else a
            ``.txt`` beside each video.

    Raises:
        UserError: if there is no video, or the caption file is not readable, names a video twice or an absent one.
    """
    if not folder.is_dir():
        raise UserError(f"video folder {str(folder)!r} {'is not a folder' if folder.exists() else 'does not exist'}")
    paths = {str(PurePosixPath(path.relative_to(folder))): path for path in folder.rglob("*") if _is_video(path)}
    if not paths:
        raise UserError(f"no video in {str(folder)!r}; files named {', '.join('*' + s for s in VIDEO_SUFFIXES)} count")
    source = captions or _caption_file(folder)
    if source is None:
        return [_with_sidecar(paths[name], name) for name in sorted(paths)]
    texts = read_captions(source)
    _check_names(source, texts, paths, folder)
    missing = f"no caption in {source.name}"
    return [Video(paths[n], n, texts.get(n, ""), None if texts.get(n) else missing) for n in sorted(paths)]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != "." and path.is_file()


def _caption_file(folder: Path) -> Path | None:
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(CAPTION_FILES)}: name one of them with --captions")
    return found[0] if found else None


def _with_sidecar(path: Path, name: str) -> Video:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return Video(path, name, problem=f"no caption: {text.name} does not exist")
    try:
        caption = " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        return Video(path, name, problem=f"caption {text.name} is not UTF-8 (byte {error.start})")
    return Video(path, name, caption, None if caption else f"no caption: {text.name} is empty")


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name.

    Raises:
        UserError: naming the line, if the file is not readable, not UTF-8, neither CSV nor JSONL with the right keys,
            or names a video twice.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"caption file {str(path)!r}: a name that ends in .csv or .jsonl is expected")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"caption file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"caption file {path}, line {line}: not UTF-8; save it as UTF-8") from error
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, name, caption in readers[path.suffix.lower()](path, text):
        name = str(PurePosixPath(name))
        if name in lines:
            raise UserError(f"caption file {path}: {name!r} is named twice, in lines {lines[name]} and {line}")
        lines[name] = line
        captions[name] = " ".join(caption.split())
    return captions


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(text.splitlines())
    header = reader.fieldnames or ()
    name = next((key for key in NAME_KEYS if key in header), None)
    caption = next((key for key in CAPTION_KEYS if key in header), None)
    if name is None or caption is None:
        raise UserError(
            f"caption file {path}: its first line must name the columns, one of {', '.join(NAME_KEYS)} and one of "
            f"{', '.join(CAPTION_KEYS)}; found {', '.join(header) or 'nothing'}"
        )
    for row in reader:
        if row[name] is None or row[caption] is None or None in row:
            raise UserError(
                f"caption file {path}, line {reader.line_num}: {len(header)} columns are expected; put a caption with "
                f"commas in double quotes"
            )
        yield reader.line_num, row[name], row[caption]


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"caption file {path}, line {number}: not JSON ({error.msg})") from error
        keys = row if isinstance(row, dict) else {}
        name = next((keys[key] for key in NAME_KEYS if key in keys), None)
        caption = next((keys[key] for key in CAPTION_KEYS if key in keys), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(
                f"caption file {path}, line {number}: an object with one of {', '.join(NAME_KEYS)} and one of "
                f"{', '.join(CAPTION_KEYS)} is expected, both texts"
            )
        yield number, name, caption


def _check_names(source: Path, texts: dict[str, str], paths: dict[str, Path], folder: Path) -> None:
    """Refuse a caption file that names absent videos."""
    absent = [name for name in texts if name not in paths]
    if absent:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        named = ", ".join(map(repr, absent[:SHOWN]))
        raise UserError(f"caption file {source}: {named}{more} not found in {folder} (names are relative to it)")
