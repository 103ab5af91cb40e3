"""Output folder of ``fastvideo preprocess``; a later call continues it only with the same settings.

``fastvideo precompute-trajectories`` uses it too; its manifest then names that ``command``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo.data.captions import Video
from fastvideo.data.index import MANIFEST
from fastvideo.data.schema import metadata_of
from fastvideo.data.workers import Share
from fastvideo.errors import UserError
from fastvideo.files import replacing

SKIPPED = "skipped.jsonl"
ALONE = Share()


def sources_key(videos: Sequence[Video]) -> str:
    """SHA-256 of the videos' names, sizes and captions, in order."""
    digest = hashlib.sha256()
    for video in videos:
        entry = [video.name, video.path.stat().st_size if video.path.exists() else None, video.caption, video.problem]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def shard_path(out: Path, number: int, stem: str = "videos") -> Path:
    return out / f"{stem}-{number:05d}.parquet"


def open_output(
    out: Path, manifest: Mapping[str, Any], *, overwrite: bool, stem: str = "videos", share: Share = ALONE
) -> list[int]:
    """Make the folder, or continue an interrupted one; the numbers of the missing files of this machine's ``share``.

    Several machines may do so at once: each writes the same manifest, and removes only what it left behind itself.

    Raises:
        UserError: if the folder holds something else, or has other settings or other videos.
    """
    if overwrite and (out / MANIFEST).is_file():
        shutil.rmtree(out)
    if (out / MANIFEST).is_file():
        _check_same(out, json.loads((out / MANIFEST).read_text(encoding="utf-8")), json.loads(json.dumps(manifest)))
    elif out.exists() and (not out.is_dir() or any(not _is_ours(item) for item in out.iterdir())):
        command = manifest.get("command", "fastvideo preprocess")
        raise UserError(f"--out: {out} exists and was not made by {command}; choose another")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    own = [number for number in range(manifest["files"]) if number in share]
    for path in (shard_path(out, number, stem) for number in own):
        for leftover in out.glob(f".{path.name}.*.part"):
            leftover.unlink()
    return [number for number in own if not shard_path(out, number, stem).is_file()]


def _replace(path: Path, text: str) -> None:
    """Replace a file that several machines may write at once."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_ours(item: Path) -> bool:
    """True for an unfinished file, and for a manifest that another machine wrote just now."""
    return item.name == MANIFEST or (item.name[0] == "." and item.suffix == ".part")


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{key}: {before['settings'].get(key)} -> {now['settings'].get(key)}"
        for key in sorted(before["settings"].keys() | now["settings"].keys())
        if before["settings"].get(key) != now["settings"].get(key)
    ]
    if before["sources"] != now["sources"]:
        changed.append(f"videos or captions: {before['videos']} files before, {now['videos']} now")
    if changed:
        raise UserError(
            f"--out: {out} was begun with other settings ({'; '.join(changed)}); choose another folder, or --overwrite"
        )


def unfinished(out: Path, files: int, stem: str = "videos") -> list[int]:
    """Numbers of the files that no machine has written yet."""
    return [number for number in range(files) if not shard_path(out, number, stem).is_file()]


def collect(out: Path, files: Sequence[int], stem: str = "videos") -> tuple[int, list[dict[str, str]]]:
    """Rows in the given files, and the skipped videos or prompts, which are also written to :data:`SKIPPED`.

    Raises:
        UserError: if a file is damaged.
    """
    rows, skipped = 0, []
    for number in files:
        path = shard_path(out, number, stem)
        try:
            footer = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run the same command again") from error
        rows += footer.num_rows
        skipped += metadata_of(footer.metadata)["skipped"]
    _replace(out / SKIPPED, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
    return rows, skipped
