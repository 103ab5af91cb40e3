"""``fastvideo preprocess``: a folder of videos to Parquet, in several processes, resumable after a kill.

Videos are dealt to output files by their name alone, and every row depends on nothing but its video: however many
processes there are and however often the work is interrupted, the same rows come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.data.captions import Video, find_videos
from fastvideo.data.clips import Policy
from fastvideo.data.model import ModelChoice
from fastvideo.data.output import SKIPPED, collect, prepare_output, shard_path, sources_key
from fastvideo.data.shards import ShardWriter
from fastvideo.data.workers import WriteFile, progress, start_server, write_files
from fastvideo.distillation.types import UserError

FORMAT = 1
"""Raised when the same settings would make other rows."""


@dataclass(frozen=True)
class Job:
    """All that a process needs to know.

    Attributes:
        choice: the model, at the size of the first bucket.
        policy: what becomes of a video.
        out: the folder.
        videos: all of them, in order.
        per_file: videos per output file.
        device: of the encoders: ``cpu``, ``cuda``, ``cuda:1``.
        model: its name, as given.
    """

    choice: ModelChoice
    policy: Policy
    out: Path
    videos: Sequence[Video]
    per_file: int
    device: str
    model: str

    @property
    def files(self) -> int:
        """Output files."""
        return -(-len(self.videos) // self.per_file)

    def part(self, number: int) -> Sequence[Video]:
        """The videos of one output file."""
        return self.videos[number * self.per_file : (number + 1) * self.per_file]

    def size(self, number: int) -> int:
        """Videos of one output file."""
        return len(self.part(number))

    def writer(self, device: str) -> WriteFile:
        """What writes an output file, on a device."""
        adapter = self.choice.adapter(device)
        made = self.settings(adapter.codec.latent_key)
        writer = ShardWriter(adapter.codec, adapter.conditioner, self.policy, made)

        def write(number: int, done: Callable[[int], None]) -> None:
            writer.write(shard_path(self.out, number), self.part(number), done)

        return write

    def settings(self, codec_key: str) -> dict[str, Any]:
        """What every row depends on besides its video."""
        length = self.choice.fields.get("max_sequence_length")
        found = {"format": FORMAT, "model": self.model, "family": self.choice.family, "codec_key": codec_key}
        found |= {"latents": "normalised", "max_sequence_length": length, **self.policy.to_dict()}
        return {**found, "videos_per_file": self.per_file}


@dataclass(frozen=True)
class Summary:
    """What came out."""

    out: Path
    clips: int
    videos: int
    skipped: list[dict[str, str]]
    seconds: float
    encoded: int

    def __str__(self) -> str:
        rate = f", {self.encoded / self.seconds:.1f} videos/s" if self.encoded else ", nothing was left to do"
        bad = f"; {len(self.skipped)} skipped, see {self.out / SKIPPED}" if self.skipped else ""
        return f"{self.out}: {self.clips} clips of {self.videos - len(self.skipped)} videos{rate}{bad}"


def preprocess(job: Job, *, workers: int, overwrite: bool = False) -> Summary:
    """Write what is not there yet.

    Raises:
        UserError: for a mistake in what the user gave; nothing is written then.
        RunError: if a process dies; the same call goes on from there.
    """
    if workers > 1:
        start_server(__name__)
    codec = job.choice.adapter(job.device).codec
    if all(video.problem for video in job.videos):
        raise UserError(f"none of {len(job.videos)} videos has a caption: {job.videos[0].problem}")
    manifest = {"settings": job.settings(codec.latent_key), "sources": sources_key(job.videos)}
    manifest |= {"videos": len(job.videos), "files": job.files}
    missing = prepare_output(job.out, manifest, overwrite=overwrite)
    begin, encoded = time.monotonic(), sum(len(job.part(number)) for number in missing)
    with progress("encoding videos", len(job.videos), len(job.videos) - encoded) as show:
        write_files(job, missing, workers, show)
    clips, skipped = collect(job.out, job.files)
    return Summary(job.out, clips, len(job.videos), skipped, time.monotonic() - begin, encoded)


def make_job(
    folder: Path, captions: Path | None, choice: ModelChoice, policy: Policy, out: Path, per_file: int, device: str
) -> Job:
    """The work on a folder of videos.

    Raises:
        UserError: if the folder, its captions or a size is not what it should be.
    """
    for size in policy.sizes:
        choice.sized(size.height, size.width, size.num_frames)
    first = policy.sizes[0]
    sized = choice.sized(first.height, first.width, first.num_frames)
    return Job(sized, policy, out, find_videos(folder, captions), per_file, device, str(choice.fields["path"]))
