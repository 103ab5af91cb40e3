"""``fastvideo generate``: one prompt in, one video file out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastvideo.cli.arguments import (
    INT,
    OptionalFrames,
    OptionalGuidance,
    OptionalPath,
    OptionalPixels,
    OptionalSteps,
    OptionalText,
    OptionalTokens,
    parse,
)
from fastvideo.ranges import Scale, Seed, WrittenRate

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.inference.sampler import SamplerSpec

WATCHABLE = 256
"""Pixels of height below which a video is enlarged for the file."""


@dataclass(frozen=True)
class GenerateArguments:
    """Generate a video from text, or text and image, with a student (few steps) or a teacher (many steps, guided)."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Model folder, a hub id, or `tiny` or `tiny_cogvideox` for a teacher that ships with this package."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """Content of the video, such as "a green seven moving up and left"."""
    image: OptionalPath = None
    """Image (or clip) that the video continues, for a model made for that; scaled and cropped to the video's size."""
    output: Path = Path("video.mp4")
    """Video file; .mp4, .gif, .webp or .apng."""
    steps: OptionalSteps = None
    """Network steps: a student takes all steps of its ladder (the default) or 1, a teacher any number (default 50)."""
    ladder: Annotated[tuple[float, ...], tyro.conf.arg(metavar="TIME...", help_behavior_hint="")] = ()
    """Run a student down these times instead of its own, such as `1.0 0.5` for two of the steps 1, 0.75, 0.5, 0.25."""
    guidance: OptionalGuidance = None
    """Guidance scale, 1 = none. Default: the one the folder names, else 1 for a student and the family's published
    one for a teacher (Wan 5, CogVideoX 6)."""
    negative_prompt: OptionalText = None
    """Prompt that guidance leads away from; default: the model's own."""
    seed: Seed = 0
    """Same seed, same video."""
    fps: WrittenRate = 8
    """Frames per second of the file."""
    scale: Annotated[Scale | None, INT] = None
    """Enlarge every pixel this many times. Default: until the video is at least 256 pixels high."""
    height: OptionalPixels = None
    """Video height in pixels. Default of all four sizes: those in the recipe; a folder without one needs them given."""
    width: OptionalPixels = None
    """Video width in pixels."""
    num_frames: OptionalFrames = None
    """Frames of the video."""
    max_sequence_length: OptionalTokens = None
    """Tokens of a prompt that the model sees."""
    device: str = "cpu"
    """Device: cpu, cuda, mps."""


def main(argv: Sequence[str]) -> int:
    """Generate; returns the exit code."""
    arguments = parse(GenerateArguments, argv, "generate")
    print(run_generate(arguments))
    return 0


def run_generate(arguments: GenerateArguments) -> str:
    """Generate and write one video; returns a summary.

    Raises:
        UserError: for a bad folder, prompt, image, number of steps or file name, before anything is written.
    """
    from fastvideo.data.video_io import video_format, write_video
    from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
    from fastvideo.inference.first_frames import first_frames
    from fastvideo.inference.generate import generate_video
    from fastvideo.inference.loading import load_model
    from fastvideo.tiny.captions import outside_note

    video_format(arguments.output, arguments.fps)
    sizes = ("height", "width", "num_frames", "max_sequence_length")
    options = {name: value for name, value in vars(arguments).items() if name in sizes and value is not None}
    model = load_model(arguments.folder, options, arguments.device)
    embedded = arguments.folder in EMBEDDED or model.recipe.get("model", {}).get("path") in EMBEDDED
    if embedded and (note := outside_note([arguments.prompt])):
        print(note, file=sys.stderr)
    spec = model.sampler(arguments.steps, arguments.guidance, arguments.ladder)
    frames = first_frames(model, arguments.image)
    begin = time.perf_counter()
    video = generate_video(model, arguments.prompt, spec, arguments.seed, arguments.negative_prompt, frames)
    seconds = time.perf_counter() - begin
    scale = arguments.scale or max(1, math.ceil(WATCHABLE / video.shape[2]))
    path = write_video(arguments.output, video, arguments.fps, scale)
    return _summary(path, video, spec, seconds)


def _summary(path: Path, video: Tensor, spec: SamplerSpec, seconds: float) -> str:
    frames, height, width = video.shape[1:]
    guidance = "" if spec.guidance == 1.0 else f", guidance {spec.guidance:g}"
    return (
        f"{path}: {frames} frames of {width}x{height}, {len(spec.times)} steps{guidance} "
        f"({spec.network_calls} network calls), {seconds:.2f} s"
    )
