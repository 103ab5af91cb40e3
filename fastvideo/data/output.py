"""Output folder of ``fastvideo preprocess``; a later call continues it only with the same settings.

``fastvideo precompute-trajectories`` uses it too; its manifest then names that ``command``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo.data.captions import Video
from fastvideo.data.index import MANIFEST
from fastvideo.data.schema import metadata_of
from fastvideo.data.workers import FileJob, progress, write_files
from fastvideo.errors import UserError
from fastvideo.files import replacing
from fastvideo.mount import check_writable
from fastvideo.shares import ALONE, Share
from fastvideo.wording import counted

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Written:
    """Outcome of a call that writes output files.

    Attributes:
        rows: in the finished files; of all machines, once none of their files is missing.
        skipped: inputs that these files left out, with reasons.
        items: inputs of these files.
        encoded: inputs that this call went through, in ``seconds``.
        left: output files that other machines have still to write.
    """

    rows: int
    skipped: list[dict[str, str]]
    items: int
    encoded: int
    seconds: float
    left: int

    def rate(self, things: str) -> str:
        """Speed of this call, for people."""
        return f"{self.encoded / self.seconds:.1f} {things}/s" if self.encoded else "nothing was left to do"

    @property
    def others(self) -> str:
        """Note of files to come, or nothing."""
        return f"; {counted(self.left, 'file')} of other shards to come" if self.left else ""


def write_missing(
    job: FileJob,
    manifest: Mapping[str, Any],
    *,
    workers: int,
    overwrite: bool = False,
    share: Share = ALONE,
    stem: str = "videos",
) -> Written:
    """Write the files of a job that are missing.

    Args:
        job: the inputs.
        manifest: settings and sources, which an earlier call must have had too.
        workers: processes on this machine.
        overwrite: delete the results of an earlier call.
        share: the files of this machine; the last machine to finish completes the folder.
        stem: of the files, and of the word for the inputs.

    Raises:
        UserError: for a folder of something else or of other settings; nothing is written then.
        RunError: if a process dies; the same call then continues.
    """
    missing = open_output(job.out, manifest, overwrite=overwrite, stem=stem, share=share)
    begin, encoded, total = time.monotonic(), job.count(missing), job.count(job.own(share))
    with progress(f"encoding {stem}", total, total - encoded) as show:
        write_files(job, missing, workers, show)
    left = unfinished(job.out, job.files, stem)
    finished = job.own(share if left else ALONE)
    rows, skipped = collect(job.out, finished, stem)
    return Written(rows, skipped, job.count(finished), encoded, time.monotonic() - begin, len(left))


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
        UserError: if the folder holds something else, has other settings or other videos, or cannot be written.
    """
    check_writable(out)
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
