"""``fastvideo preprocess``: a folder of videos to Parquet, in several processes, resumable after a kill.

A video's name chooses its output file, and a row depends on its video alone: any number of processes and interruptions
gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvideo.data.captions import Video, find_videos
from fastvideo.data.clips import Policy, Size
from fastvideo.data.model import ModelChoice
from fastvideo.data.output import SKIPPED, Written, shard_path, sources_key, write_missing
from fastvideo.data.shards import ShardWriter
from fastvideo.data.stills import is_image
from fastvideo.data.workers import FileJob, WriteFile, start_server
from fastvideo.distillation.adapters.base import Codec
from fastvideo.errors import UserError
from fastvideo.shares import ALONE, Share

FORMAT = 2
"""Increase it when the same settings give other rows."""


@dataclass(frozen=True)
class Job(FileJob):
    """Encode a list of videos.

    Attributes:
        choice: the model, at the size of the first bucket.
        policy: cut and fit of a video.
        videos: all videos, in order.
        model: the model's name, as given.
    """

    choice: ModelChoice
    policy: Policy
    videos: Sequence[Video]
    model: str

    def __len__(self) -> int:
        return len(self.videos)

    def writer(self, device: str) -> WriteFile:
        adapter = self.choice.adapter(device)
        made = self.settings(adapter.codec.latent_key)
        writer = ShardWriter(adapter.codec, adapter.conditioner, self.policy, made)

        def write(number: int, done: Callable[[int], None]) -> None:
            writer.write(shard_path(self.out, number), [self.videos[i] for i in self.part(number)], done)

        return write

    def settings(self, codec_key: str) -> dict[str, Any]:
        """Everything that a row depends on besides its video."""
        return {
            "format": FORMAT,
            "model": self.model,
            "family": self.choice.family,
            "codec_key": codec_key,
            "latents": "normalised",
            "max_sequence_length": self.choice.fields.get("max_sequence_length"),
            **self.policy.to_dict(),
            "videos_per_file": self.per_file,
        }


def summary(out: Path, found: Written) -> str:
    """Outcome of a call for the terminal."""
    count = len(found.skipped)
    bad = f"; {count} skipped, see {out / SKIPPED}" if count else ""
    return f"{out}: {found.rows} clips of {found.items - count} videos, {found.rate('videos')}{bad}{found.others}"


def preprocess(job: Job, *, workers: int, overwrite: bool = False, share: Share = ALONE) -> Written:
    """Write the missing files.

    Args:
        job: the videos.
        workers: processes on this machine.
        overwrite: delete the results of an earlier call.
        share: the files of this machine, if several write into the folder; the last one to finish completes it.

    Raises:
        UserError: for a mistake in the call; nothing is written then.
        RunError: if a process dies; the same call then continues.
    """
    if workers > 1:
        start_server(__name__)
    codec = job.choice.adapter(job.device).codec
    _check_sizes(job.policy, codec)
    manifest: dict[str, Any] = {"settings": job.settings(codec.latent_key), "sources": sources_key(job.videos)}
    manifest |= {"videos": len(job.videos), "files": job.files}
    return write_missing(job, manifest, workers=workers, overwrite=overwrite, share=share)


def _check_sizes(policy: Policy, codec: Codec) -> None:
    """Latents of several parts are taken apart by one size alone."""
    if codec.parts is not None and len(policy.sizes) > 1:
        sizes = ", ".join(map(str, policy.sizes))
        raise UserError(f"--buckets {sizes}: latents of {codec.parts} have one size: give one")


def make_job(
    folder: Path,
    captions: Path | None,
    choice: ModelChoice,
    policy: Policy,
    out: Path,
    per_file: int,
    device: str,
    seed: int = 0,
) -> Job:
    """The job for a folder of videos; ``seed`` chooses among several captions of a video.

    Raises:
        UserError: for a wrong folder, caption file or size.
    """
    for size in policy.sizes:
        choice.sized(size.height, size.width, size.num_frames)
    first = policy.sizes[0]
    sized = choice.sized(first.height, first.width, first.num_frames)
    videos = find_videos(folder, captions, seed)
    if reason := why_no_images(choice, first):
        videos = [replace(video, problem=reason) if is_image(video.path) else video for video in videos]
    return Job(out, per_file, device, sized, policy, videos, str(choice.fields["path"]))


def why_no_images(choice: ModelChoice, size: Size) -> str:
    """Reason why a model takes no video of one frame; empty if it does."""
    try:
        choice.sized(size.height, size.width, 1)
    except UserError as error:
        return f"an image is a video of one frame, which the model does not take: {error}"
    return ""
