"""``fastvideo preprocess``: encode videos and captions to Parquet, once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvideo.cli.arguments import Count, OptionalFile, OptionalFloat, OptionalInt, Switch, parse
from fastvideo.errors import UserError, counted


@dataclass(frozen=True)
class PreprocessArguments:
    """Encode a folder of videos and captions once, into Parquet files to train on.

    The same call again continues an interrupted one. Exit code 0: every video is encoded; 1: finished, but some videos
    were skipped and are listed in OUT/skipped.jsonl; 2: a mistake in the call, nothing was done.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")]
    """Folder of videos (.mp4, .webm, .mov, .gif, .mkv, .avi, .m4v) and images (.png, .jpg, .webp, .bmp, .tif, .avif),
    which are videos of one frame; folders in it are searched too."""
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
    """Frame rate, by dropping or repeating frames as `ffmpeg -vf fps` does; Wan is trained at 16. Default: every frame
    as it is."""
    every_clip: Switch = False
    """Cut the whole video into clips, instead of taking its beginning."""
    background: str = "black"
    """Colour behind transparent pixels: a name such as white, or #rrggbb."""
    videos_per_file: Count = 64
    """Videos per Parquet file; an interruption loses at most this many per process."""
    device: str = "cpu"
    """Device: cpu, or cuda (the processes share all GPUs)."""
    overwrite: Switch = False
    """Delete the results of an earlier call in the folder."""


def main(argv: Sequence[str]) -> int:
    """Preprocess; returns the exit code."""
    arguments = parse(PreprocessArguments, argv, "preprocess")

    from fastvideo.data.clips import Policy, Size
    from fastvideo.data.colours import parse_colour
    from fastvideo.data.model import SIZES, choose_model
    from fastvideo.data.preprocess import make_job, preprocess
    from fastvideo.data.stills import is_image

    if arguments.fps is not None and not arguments.fps > 0:
        raise UserError(f"--fps must be above 0, got {arguments.fps}")
    choice = choose_model(arguments.model, {name: getattr(arguments, name) for name in SIZES})
    own = Size(*(choice.fields[name] for name in ("height", "width", "num_frames")))
    sizes = tuple(dict.fromkeys(Size.parse(text) for text in arguments.buckets)) or (own,)
    background = parse_colour(arguments.background)
    policy = Policy(sizes, arguments.fit, arguments.fps, arguments.every_clip, background)
    job = make_job(
        arguments.folder, arguments.captions, choice, policy, arguments.out, arguments.videos_per_file, arguments.device
    )
    rate = "as they are" if policy.fps is None else f"at {policy.fps:g} fps"
    shown = ", ".join(map(str, sizes))
    images = sum(is_image(video.path) for video in job.videos)
    found = f"{len(job.videos) - images} videos" + (f" and {counted(images, 'image')}" if images else "")
    print(f"{found}, frames {rate}, {policy.fit} to {shown} (HxWxF)", file=sys.stderr)
    summary = preprocess(job, workers=arguments.workers, overwrite=arguments.overwrite)
    print(summary)
    return 1 if summary.skipped else 0
