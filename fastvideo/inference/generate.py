"""``fastvideo generate``: one prompt in, one video file out."""

from __future__ import annotations

import math
import time
from pathlib import Path

from torch import Tensor

from fastvideo.data.video_io import video_format, write_video
from fastvideo.inference.cli import GenerateArguments
from fastvideo.inference.first_frames import first_frames
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import SamplerSpec, generate_latents

WATCHABLE = 256
"""Pixels of height below which a video is enlarged for the file."""


def run_generate(arguments: GenerateArguments) -> str:
    """Generate and write one video; returns the line that tells what was done.

    Raises:
        UserError: for a bad folder, prompt, image, number of steps or file name; nothing is written then.
    """
    video_format(arguments.output)
    sizes = ("height", "width", "num_frames", "max_sequence_length")
    options = {name: value for name, value in vars(arguments).items() if name in sizes and value is not None}
    model = load_model(arguments.folder, options, arguments.device)
    spec = model.sampler(arguments.steps, arguments.guidance, arguments.ladder)
    frames = first_frames(model, arguments.image)
    begin = time.perf_counter()
    video = generate_video(model, arguments.prompt, spec, arguments.seed, arguments.negative_prompt, frames)
    seconds = time.perf_counter() - begin
    scale = arguments.scale or max(1, math.ceil(WATCHABLE / video.shape[2]))
    path = write_video(arguments.output, video, arguments.fps, scale)
    return _summary(path, video, spec, seconds)


def generate_video(
    model: LoadedModel,
    prompt: str,
    spec: SamplerSpec,
    seed: int = 0,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
) -> Tensor:
    """The video ``[3, T, H, W]`` in ``[-1, 1]`` of one prompt, float32 on the CPU.

    ``frames`` ``[1, 3, T', H, W]`` are those that it goes on from.

    Raises:
        UserError: for a prompt that the text encoder cannot take.
    """
    with PatientBar("generating", spec.network_calls) as bar:
        latents = generate_latents(
            model.adapter,
            model.network,
            [prompt],
            spec,
            seed=seed,
            negative_prompt=negative_prompt,
            frames=frames,
            progress=bar,
        )
    return model.adapter.codec.decode(latents.to(model.adapter.device))[0].float().cpu().clamp(-1, 1)


def _summary(path: Path, video: Tensor, spec: SamplerSpec, seconds: float) -> str:
    frames, height, width = video.shape[1:]
    guidance = "" if spec.guidance == 1.0 else f", guidance {spec.guidance:g}"
    return (
        f"{path}: {frames} frames of {width}x{height}, {len(spec.times)} steps{guidance} "
        f"({spec.network_calls} network calls), {seconds:.2f} s"
    )
