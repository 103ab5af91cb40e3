"""``fastvideo generate``: options, free of heavy imports so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]


@dataclass(frozen=True)
class GenerateArguments:
    """Generate a video from text, or text and image, with a student (few steps) or a teacher (many steps, guided)."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Model folder, a hub id, or `tiny` or `tiny_cogvideox` for a teacher that ships with this package."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What to show, such as "a green seven moving up and left"."""
    image: OptionalPath = None
    """Image (or clip) that the video goes on from, for a model made for that. It is scaled until it fills the video's
    size, and what hangs over is cut off on both sides."""
    output: Path = Path("video.mp4")
    """Where the video goes; .mp4, .gif, .webp or .apng."""
    steps: OptionalInt = None
    """Network steps: a student takes all steps of its ladder (the default) or 1, a teacher any number (default 50)."""
    ladder: Annotated[tuple[float, ...], tyro.conf.arg(metavar="TIME...", help_behavior_hint="")] = ()
    """Run a student down these times instead of its own, such as `1.0 0.5` for two of the rungs 1, 0.75, 0.5, 0.25."""
    guidance: OptionalFloat = None
    """Guidance scale, 1 = none. Default: the one the folder names, else 1 for a student and the family's published
    one for a teacher (Wan 5, CogVideoX 6)."""
    negative_prompt: OptionalText = None
    """What guidance leads away from; default: the model's own."""
    seed: int = 0
    """Same seed, same video."""
    fps: int = 8
    """Frames per second of the file."""
    scale: OptionalInt = None
    """Enlarge every pixel this many times. Default: until the video is at least 256 pixels high."""
    height: OptionalInt = None
    """Video height in pixels. Default of all four sizes: those in the recipe; a folder without one needs them given."""
    width: OptionalInt = None
    """Video width in pixels."""
    num_frames: OptionalInt = None
    """Frames of the video."""
    max_sequence_length: OptionalInt = None
    """Tokens of a prompt that the model sees."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""


def main(argv: Sequence[str]) -> int:
    """Generate; the exit code."""
    arguments = tyro.cli(GenerateArguments, args=list(argv), prog="fastvideo generate")

    from fastvideo.inference.generate import run_generate

    print(run_generate(arguments))
    return 0
