"""``fastvideo generate``: one prompt in, one video file out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvideo.cli.arguments import (
    INT,
    OptionalArithmetic,
    OptionalFrames,
    OptionalGuidance,
    OptionalPath,
    OptionalPixels,
    OptionalRate,
    OptionalSteps,
    OptionalText,
    OptionalTokens,
    parse,
)
from fastvideo.errors import UserError
from fastvideo.ranges import Seed
from fastvideo.sampling_ranges import ON_SWITCH, OnSwitch, Scale
from fastvideo.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.data.video_io import Frames, Rate
    from fastvideo.distillation.sample import SamplerSpec
    from fastvideo.inference.generate import SoundedVideo
    from fastvideo.inference.loading import LoadedModel, OpenedModel

WATCHABLE = 256
"""Pixels of height below which a video is enlarged for the file."""


@dataclass(frozen=True)
class GenerateArguments:
    """Generate a video from text, or text and image, with a student (few steps) or a teacher (many steps, guided)."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Model folder, a hub id, or `tiny`, `tiny_cogvideox`, `tiny_stream`, `tiny_soft` or `tiny_stills` for a teacher
    that ships here."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Content of the video, such as "a green seven moving up and left"; empty for a video of anything."""
    image: OptionalPath = None
    """Image (or clip) that the video continues, for a model made for that or a streaming student; scaled and cropped to
    the video's size."""
    out: Path = Path("video.mp4")
    """Video file; .mp4, .gif, .webp or .apng; .png for a still. Beside any but .mp4, sound replaces the .wav of its
    name."""
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
    fps: OptionalRate = None
    """Frames per second of the file. Default: 8; a model with sound uses its own rate and refuses others."""
    scale: Annotated[Scale | None, INT] = None
    """Enlarge every pixel this many times. Default: until the video is at least 256 pixels high."""
    height: OptionalPixels = None
    """Video height in pixels. Default of all four sizes: those in the recipe; a folder without one needs them given."""
    width: OptionalPixels = None
    """Video width in pixels."""
    frames: OptionalFrames = None
    """Frames of the video. A streaming student makes any number, written as they come."""
    max_sequence_length: OptionalTokens = None
    """Tokens of a prompt that the model sees."""
    switch: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FRAME:PROMPT")] = ()
    """Change the prompt of a stream from a frame on, such as 65:"a red seven moving up"; may be repeated."""
    on_switch: OnSwitch = ON_SWITCH
    """Past of a stream at a switch: keep its sink and last chunk (flush), read all of it again under the new prompt
    (recache), leave it as it is (keep), or begin a new video (cut)."""
    window: OptionalFrames = None
    """Latent frames of the past that a streaming student sees, instead of those it was trained with."""
    device: str = "cpu"
    """Device: cpu, cuda, mps."""
    precision: OptionalArithmetic = None
    """Precision that the network is held and computed in; bfloat16 takes half of the memory. Default: the model's own
    (`precision` in its recipe), else float32."""


def main(argv: Sequence[str]) -> int:
    """Generate; returns the exit code."""
    arguments = parse(GenerateArguments, argv, "generate")
    print(run_generate(arguments))
    return 0


def run_generate(arguments: GenerateArguments) -> str:
    """Generate and write one video; returns a summary.

    Raises:
        UserError: for a bad folder, prompt, image, number of steps, switch or file name, before anything is written.
        Stopped: for a stream that a signal ended; its file plays.
    """
    from fastvideo.data.video_io import FPS, video_format
    from fastvideo.inference.loading import open_model, with_network
    from fastvideo.mount import check_writable

    video_format(arguments.out, arguments.fps or FPS)
    check_writable(arguments.out)
    opened = open_model(arguments.folder, _options(arguments), arguments.device)
    spec = opened.sampler(arguments.steps, arguments.guidance, arguments.ladder)
    _check_flags(arguments, opened.source, spec)
    if spec.reach is None:
        return _whole(arguments, with_network(opened), spec)
    given = _given(arguments, opened)
    return _stream(arguments, with_network(opened), spec, given)


def _check_flags(arguments: GenerateArguments, source: str, spec: SamplerSpec) -> None:
    """Refuse, before the weights are read, flags that this model's sampler does not obey."""
    if arguments.negative_prompt and spec.guidance == 1.0:
        raise UserError(
            "--negative-prompt: guidance leads away from it, and this model runs without: add --guidance above 1, "
            "which models that are distilled may not take"
        )
    if spec.reach is None and (flag := _flag_of_streams(arguments)):
        raise UserError(
            f"{flag} is for streaming students, and the model in {source} makes whole videos at once: its "
            f"recipe.json has no `streaming`, which training with a causal method writes"
        )
    if arguments.on_switch != ON_SWITCH and not arguments.switch:
        raise UserError(f'--on-switch {arguments.on_switch}: no prompt changes: add --switch FRAME:"PROMPT"')


def _options(arguments: GenerateArguments) -> dict[str, Any]:
    """Fields of the model's config."""
    found = {field: getattr(arguments, field) for field in ("height", "width", "max_sequence_length", "precision")}
    found["num_frames"] = arguments.frames
    return {field: value for field, value in found.items() if value is not None}


def _whole(arguments: GenerateArguments, model: LoadedModel, spec: SamplerSpec) -> str:
    """A video that is made at once."""
    from fastvideo.inference.first_frames import first_frames
    from fastvideo.inference.generate import generate_sounded
    from fastvideo.tiny.captions import outside_note

    if model.is_embedded and arguments.prompt and (note := outside_note([arguments.prompt])):
        print(note, file=sys.stderr)
    frames, rate = first_frames(model, arguments.image), _rate(arguments, model)
    begin = time.perf_counter()
    clip = generate_sounded(model, arguments.prompt, spec, arguments.seed, arguments.negative_prompt, frames)
    seconds = time.perf_counter() - begin
    note = _write(arguments, clip, rate)
    return f"{_summary(arguments.out, clip.video, spec, seconds)}{note}"


def _flag_of_streams(arguments: GenerateArguments) -> str | None:
    """The first flag that is given and that only a stream obeys."""
    given = {
        "--switch": arguments.switch,
        "--on-switch": arguments.on_switch != ON_SWITCH,
        "--window": arguments.window,
    }
    return next((flag for flag, value in given.items() if value), None)


def _rate(arguments: GenerateArguments, model: LoadedModel) -> Rate:
    """Frames per second of the file.

    Raises:
        UserError: for another than that of the model's sound, one that the format of the file does not hold, or a
            folder where the sound goes beside it.
    """
    from fastvideo.data.footage import rate_of
    from fastvideo.data.video_io import FPS, video_format
    from fastvideo.distillation.sound import SoundCodec

    codec = model.adapter.codec
    if not isinstance(codec, SoundCodec):
        return arguments.fps or FPS
    own = codec.sounding_rate
    if arguments.fps not in (None, own):
        raise UserError(f"--fps {arguments.fps}: sound and pictures of this model fit at {own:g}: leave --fps out")
    exact, beside = rate_of(own), _sound_file(arguments.out)
    if not video_format(arguments.out, exact).has_sound and beside.is_dir():
        raise UserError(f"--out {arguments.out}: its sound goes into {beside}, which is a folder: choose another name")
    return exact


def _sound_file(out: Path) -> Path:
    """The file beside a video whose format has no sound."""
    return out.with_suffix(".wav")


def _write(arguments: GenerateArguments, clip: SoundedVideo, rate: Rate) -> str:
    """Write the video, with its sound in it or beside it; returns a line about the sound."""
    from fastvideo.data.sound_io import write_wav
    from fastvideo.data.video_io import video_format, write_video

    within, sound = video_format(arguments.out).has_sound, clip.sound
    write_video(arguments.out, clip.video, rate, _scale(arguments, clip.video.shape[2]), sound if within else None)
    if sound is None:
        return ""
    place = "" if within else f" in {write_wav(_sound_file(arguments.out), sound)}"
    return f"\n{sound.seconds:.2f} s of sound at {sound.rate} Hz{place}"


def _given(arguments: GenerateArguments, opened: OpenedModel) -> Frames | None:
    """The frames of ``--image`` that a stream goes on from, read before the weights are.

    Raises:
        UserError: for a file that cannot be read, or one that leaves no frame to make.
    """
    from fastvideo.inference.first_frames import read_beginning

    if arguments.image is None:
        return None
    given = read_beginning(arguments.image, opened)
    if len(given) == opened.adapter.config.num_frames:
        raise UserError(
            f"--image {arguments.image}: it has as many frames as the video is to have, {len(given)} or more, so that "
            f"none would be made: raise --frames, or cut the clip"
        )
    return given


def _stream(arguments: GenerateArguments, model: LoadedModel, spec: SamplerSpec, given: Frames | None) -> str:
    """A video that is written while it is made, behind the frames of ``--image`` if there are any."""
    from fastvideo.data.video_io import FPS
    from fastvideo.inference.stream_file import write_stream
    from fastvideo.inference.streaming import Streamer, window_note, with_window
    from fastvideo.inference.switch_plan import parse_switch, plan_switches

    seen, config = with_window(spec, arguments.window), model.adapter.config
    streamer = Streamer(model, seen, arguments.seed, arguments.negative_prompt)
    wanted, known = [*map(parse_switch, arguments.switch)], 0 if given is None else len(given)
    plan = plan_switches(streamer, config.num_frames, wanted, arguments.on_switch, known)
    for note in filter(None, (window_note(spec, arguments.window), *plan.notes)):
        print(note, file=sys.stderr)
    begin, scale = time.perf_counter(), _scale(arguments, config.height)
    with streamer.open(arguments.prompt, frames=config.num_frames, given=given) as stream:
        stats = write_stream(stream, plan, config.num_frames, arguments.out, arguments.fps or FPS, scale)
    seconds = time.perf_counter() - begin
    size = f"{config.width}x{config.height}"
    parts = f"{counted(stats.frames, 'frame')} of {size} in {counted(stats.chunks, 'chunk')}"
    behind = f", the first {known} of {arguments.image}" if known else ""
    made = f"{parts}{behind}, {seconds:.2f} s, {stats.fps:.1f} frames/s"
    return f"{arguments.out}: {made}\n{streamer.describe(stats.past_bytes)}"


def _scale(arguments: GenerateArguments, height: int) -> int:
    return arguments.scale or max(1, math.ceil(WATCHABLE / height))


def _summary(path: Path, video: Tensor, spec: SamplerSpec, seconds: float) -> str:
    from fastvideo.distillation.sample import guidance_text

    frames, height, width = video.shape[1:]
    guidance = "" if spec.guidance == 1.0 else f", guidance {guidance_text(spec.guidance)}"
    return (
        f"{path}: {counted(frames, 'frame')} of {width}x{height}, {counted(len(spec.times), 'step')}{guidance} "
        f"({counted(spec.network_calls, 'network call')}), {seconds:.2f} s"
    )
