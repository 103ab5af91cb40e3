"""``fastvideo preprocess``: encode videos and captions to Parquet, once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvideo.cli.arguments import Count, OptionalFile, OptionalFloat, OptionalInt, Switch, parse
from fastvideo.errors import UserError


@dataclass(frozen=True)
class PreprocessArguments:
    """Encode a folder of videos and captions once, into Parquet files to train on.

    The same call again continues an interrupted one. Exit code 0: every video is encoded; 1: finished, but some videos
    were skipped and are listed in OUT/skipped.jsonl; 2: a mistake in the call, nothing was done.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")]
    """Folder of .mp4, .webm, .mov, .gif, .mkv, .avi or .m4v files; folders in it are searched too."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """The model to encode for: a diffusers pipeline folder, a hub id, or `tiny`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the Parquet files."""
    captions: OptionalFile = None
    """CSV (with a header) or JSONL file with file_name and caption. Default: captions.csv or captions.jsonl in the
    folder, else a .txt file beside each video."""
    workers: Count = 1
    """Processes, each with one thread; the rows do not depend on their number."""
    height: OptionalInt = None
    """Height in pixels. Default of all four sizes: the model's own."""
    width: OptionalInt = None
    """Width in pixels."""
    num_frames: OptionalInt = None
    """Frames of a clip; a shorter video is skipped."""
    max_sequence_length: OptionalInt = None
    """Tokens that a caption may have; a video with a longer one is skipped."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HxWxF ...", help_behavior_hint="")] = ()
    """Several sizes instead of one, such as 480x832x81 832x480x81: a video takes the nearest aspect ratio, and of those
    the longest that it fills."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Fit for another aspect ratio: cut both sides, add black bars, or distort."""
    fps: OptionalFloat = None
    """Frame rate, by dropping or repeating frames; Wan is trained at 16. Default: every frame as it is."""
    every_clip: Switch = False
    """Cut the whole video into clips, instead of taking its beginning."""
    videos_per_file: Count = 64
    """Videos per Parquet file; an interruption loses at most this many per process."""
    device: str = "cpu"
    """Device: cpu, or cuda (the processes share all GPUs)."""
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Share of this machine, if N machines write into one folder: each starts with the same flags and its own I, from
    1 to N. The result is that of one machine; the last to finish completes it."""
    overwrite: Switch = False
    """Delete the results of an earlier call in the folder."""


def main(argv: Sequence[str]) -> int:
    """Preprocess; returns the exit code."""
    arguments = parse(PreprocessArguments, argv, "preprocess")

    from fastvideo.data.clips import Policy, Size
    from fastvideo.data.model import SIZES, choose_model
    from fastvideo.data.preprocess import make_job, preprocess
    from fastvideo.data.workers import Share

    if arguments.fps is not None and not arguments.fps > 0:
        raise UserError(f"--fps must be above 0, got {arguments.fps}")
    share = Share.parse(arguments.shard)
    if arguments.overwrite and share.count > 1:
        raise UserError(
            f"--overwrite with --shard {share} would delete what the others write; delete the folder yourself"
        )
    choice = choose_model(arguments.model, {name: getattr(arguments, name) for name in SIZES})
    own = Size(*(choice.fields[name] for name in ("height", "width", "num_frames")))
    sizes = tuple(dict.fromkeys(Size.parse(text) for text in arguments.buckets)) or (own,)
    policy = Policy(sizes, arguments.fit, arguments.fps, arguments.every_clip)
    job = make_job(
        arguments.folder, arguments.captions, choice, policy, arguments.out, arguments.videos_per_file, arguments.device
    )
    rate = "as they are" if policy.fps is None else f"at {policy.fps:g} fps"
    shown = ", ".join(map(str, sizes))
    print(f"{len(job.videos)} videos, frames {rate}, {policy.fit} to {shown} (HxWxF)", file=sys.stderr)
    summary = preprocess(job, workers=arguments.workers, overwrite=arguments.overwrite, share=share)
    print(summary)
    return 1 if summary.skipped else 0
