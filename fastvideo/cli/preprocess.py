"""``fastvideo preprocess``: encode videos and captions to Parquet, once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvideo.cli.arguments import (
    FLOAT,
    OptionalFile,
    OptionalFrames,
    OptionalPixels,
    OptionalPlace,
    OptionalText,
    OptionalTokens,
    Switch,
    parse,
)
from fastvideo.errors import UserError
from fastvideo.ranges import PositiveInt, Seed
from fastvideo.sampling_ranges import BatchSize, FrameRate, Workers
from fastvideo.shares import Share
from fastvideo.wording import counted


@dataclass(frozen=True)
class PreprocessArguments:
    """Encode a folder of videos and captions once, or a file of prompts, into Parquet files to train on.

    The same call again continues an interrupted one. Exit code 0: everything is encoded (prompts that are too long are
    listed in OUT/skipped.jsonl); 1: finished, but some videos were skipped and are listed there; 2: a mistake in the
    call, nothing was done.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the Parquet files."""
    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS", help_behavior_hint="")] = None
    """Folder of videos (.mp4, .webm, .mov, .gif, .mkv, .avi, .m4v) and images (.png, .jpg, .webp, .bmp, .tif, .avif),
    which are videos of one frame; folders in it are searched too."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model to encode for: a diffusers pipeline folder, a hub id, or `tiny`."""
    prompts: OptionalPlace = None
    """Text file with one prompt per line, instead of VIDEOS: encodes texts alone, for methods that need no videos. The
    run then loads no text encoder."""
    config: OptionalFile = None
    """Config of a run, instead of --model: encodes for each of its families, with its negative and validation prompts.
    Without --prompts it takes the config's."""
    negative_prompt: OptionalText = None
    """Negative prompt, stored beside the prompts. Default: the model's own."""
    validation_prompts: OptionalPlace = None
    """Text file with the prompts of the run's validation, stored beside the others."""
    prompts_per_file: PositiveInt = 1024
    """Prompts per Parquet file; an interruption loses at most this many per process."""
    batch_size: BatchSize = 32
    """Prompts that go through the text encoder together."""
    strict: Switch = False
    """Refuse prompts that are too long for the text encoder, instead of leaving them out."""
    captions: OptionalFile = None
    """CSV or TSV (with a header), JSONL or JSON file with file_name and caption. Default: captions.*, metadata.* or
    videos2caption.json in the folder, else a .txt file beside each video."""
    caption_seed: Seed = 0
    """Seed of the choice where a video has a list of captions."""
    workers: Workers = 1
    """Processes, each with one thread; the rows do not depend on their number."""
    height: OptionalPixels = None
    """Height in pixels. Default of all four sizes: the model's own."""
    width: OptionalPixels = None
    """Width in pixels."""
    num_frames: OptionalFrames = None
    """Frames of a clip; a shorter video is skipped."""
    max_sequence_length: OptionalTokens = None
    """Tokens that a caption may have; a video with a longer one is skipped."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HxWxF ...", help_behavior_hint="")] = ()
    """Several sizes instead of one, such as 480x832x81 832x480x81: a video takes the nearest aspect ratio, and of those
    the longest that it fills."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Fit for another aspect ratio: cut both sides, add black bars, or distort."""
    fps: Annotated[FrameRate | None, FLOAT] = None
    """Frame rate, by dropping or repeating frames as `ffmpeg -vf fps` does; Wan is trained at 16. Default: every frame
    as it is."""
    every_clip: Switch = False
    """Cut the whole video into clips, instead of taking its beginning."""
    background: str = "black"
    """Colour behind transparent pixels: a name such as white, or #rrggbb."""
    videos_per_file: PositiveInt = 64
    """Videos per Parquet file; an interruption loses at most this many per process."""
    device: str = "cpu"
    """Device: cpu, or cuda (the processes share all GPUs)."""
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Share of this machine, if N machines write into one folder: each starts with the same flags and its own I, from
    1 to N. The result is that of one machine; the last to finish completes it."""
    overwrite: Switch = False
    """Delete the results of an earlier call in the folder."""


PROMPTS_ALONE = ("negative_prompt", "validation_prompts", "prompts_per_file", "batch_size", "strict", "config")
VIDEOS_ALONE = ("captions", "caption_seed", "buckets", "fit", "fps", "every_clip", "background", "videos_per_file")
"""Options that mean nothing for the other kind of data."""


def main(argv: Sequence[str]) -> int:
    """Preprocess; returns the exit code."""
    arguments = parse(PreprocessArguments, argv, "preprocess")
    if arguments.prompts is not None or arguments.config is not None:
        _check_unused(arguments, ("folder", *VIDEOS_ALONE), "of videos, and prompts are encoded here")
        return _texts(arguments)
    _check_unused(arguments, PROMPTS_ALONE, "of --prompts, and videos are encoded here")
    if arguments.folder is None or arguments.model is None:
        raise UserError("give VIDEOS --model MODEL, or --prompts FILE --model MODEL")
    return _videos(arguments, arguments.folder, arguments.model)


def _check_unused(arguments: PreprocessArguments, names: Sequence[str], why: str) -> None:
    for field in fields(PreprocessArguments):
        if field.name in names and getattr(arguments, field.name) != field.default:
            name = "VIDEOS" if field.name == "folder" else f"--{field.name.replace('_', '-')}"
            raise UserError(f"{name} is an option {why}")


def _texts(arguments: PreprocessArguments) -> int:
    from fastvideo.cli.text_job import make_text_job
    from fastvideo.data.texts import preprocess_texts

    share = _share(arguments)
    job = make_text_job(arguments)
    print(f"{counted(len(job), 'prompt')} for {', '.join(choice.family for choice in job.choices)}", file=sys.stderr)
    options = {"overwrite": arguments.overwrite, "strict": arguments.strict, "share": share}
    print(preprocess_texts(job, workers=arguments.workers, **options))
    return 0


def _share(arguments: PreprocessArguments) -> Share:
    share = Share.parse(arguments.shard)
    if arguments.overwrite and share.count > 1:
        raise UserError(
            f"--overwrite with --shard {share} would delete what the others write; delete the folder yourself"
        )
    return share


def _videos(arguments: PreprocessArguments, folder: Path, model: str) -> int:
    from fastvideo.data.clips import Policy, Size
    from fastvideo.data.colours import parse_colour
    from fastvideo.data.model import SIZES, choose_model
    from fastvideo.data.preprocess import make_job, preprocess, summary
    from fastvideo.data.stills import is_image

    share = _share(arguments)
    choice = choose_model(model, {name: getattr(arguments, name) for name in SIZES})
    own = Size(*(choice.fields[name] for name in ("height", "width", "num_frames")))
    sizes = tuple(dict.fromkeys(Size.parse(text) for text in arguments.buckets)) or (own,)
    background = parse_colour(arguments.background)
    policy = Policy(sizes, arguments.fit, arguments.fps, arguments.every_clip, background)
    files = {"out": arguments.out, "per_file": arguments.videos_per_file, "device": arguments.device}
    job = make_job(folder, arguments.captions, choice, policy, **files, seed=arguments.caption_seed)
    rate = "as they are" if policy.fps is None else f"at {policy.fps:g} fps"
    shown = ", ".join(map(str, sizes))
    images = sum(is_image(video.path) for video in job.videos)
    found = f"{len(job.videos) - images} videos" + (f" and {counted(images, 'image')}" if images else "")
    print(f"{found}, frames {rate}, {policy.fit} to {shown} (HxWxF)", file=sys.stderr)
    written = preprocess(job, workers=arguments.workers, overwrite=arguments.overwrite, share=share)
    print(summary(job.out, written))
    return 1 if written.skipped else 0
