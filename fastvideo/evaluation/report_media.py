"""Videos inside the page, each with its middle frame for readers who pause them or prefer reduced motion."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av

from fastvideo.evaluation.report_run import MIME, SMALL, Run, VideoFile

MOST_VIDEO_BYTES = 3_000_000
"""Characters of embedded videos: a page with its curves and configs stays below 5 MB."""
MOST_PROMPTS = 10
MOST_ABREAST = 8
"""Most videos of a prompt in one line under common headings; more wrap, each with its caption."""
WIDEST_STILL = 1600
"""Pixels to which the still of a wide strip is reduced."""
STRIPS = {
    "student": "Student",
    "ema": "Student, averaged weights",
    "teacher": "Teacher, prompts of the health check",
    "x0": "From top to bottom: the student's videos, and the clean video that student, critic and teacher see in them "
    "at noise level 0.5",
}
"""Captions of validation videos by name, in the order of the page."""


class Picture(NamedTuple):
    """A looping video (an animated image unless it ``plays``) and its still, as data URIs, with a description."""

    moving: str
    still: str
    plays: bool
    alt: str


@dataclass(frozen=True)
class ModelVideos:
    """The videos of one model: heading, colour class, one file per prompt."""

    title: str
    style: str
    files: Sequence[VideoFile]


class PromptGrid(NamedTuple):
    """Videos of a gallery, prompts down and models across; fewer rows than ``wanted`` if the page is full."""

    models: Sequence[ModelVideos]
    rows: Sequence[tuple[str, Sequence[Picture]]]
    wanted: int
    look: str
    many: bool


class Strip(NamedTuple):
    """A validation video with its caption; no picture if the page is full."""

    title: str
    picture: Picture | None


def gallery(prompts: Sequence[str], models: Sequence[ModelVideos]) -> PromptGrid:
    """As many of the first prompts as fit the page."""
    wanted = prompts[:MOST_PROMPTS]
    rows: list[tuple[str, list[Picture]]] = []
    size = 0
    for index, prompt in enumerate(wanted):
        pictures = [picture(model.files[index], f"{model.title}: {prompt}") for model in models]
        size += sum(map(_characters, pictures))
        if size > MOST_VIDEO_BYTES:
            break
        rows.append((prompt, pictures))
    width, height = _size(models[0].files[0])
    rendering = "pixelated" if height <= SMALL else "auto"
    look = f"--columns:{len(models)};--aspect:{width}/{height};--rendering:{rendering}"
    return PromptGrid(models, rows, len(wanted), look, len(models) > MOST_ABREAST)


def validation_strips(runs: Sequence[Run]) -> list[tuple[str, list[Strip]]]:
    """Videos of the last validation of each run without a gallery, by title; equal videos appear once."""
    left, drawn = MOST_VIDEO_BYTES, set[bytes]()
    found = []
    for run in runs:
        if run.gallery is not None or run.validation is None:
            continue
        strips = []
        for name, file in sorted(run.validation.videos.items(), key=lambda item: [*STRIPS, item[0]].index(item[0])):
            if file.data in drawn:  # a teacher that the runs share
                continue
            strip = _strip(STRIPS.get(name, name), file, run, left)
            left -= _characters(strip.picture) if strip.picture else 0
            drawn.add(file.data)
            strips.append(strip)
        name = f"{run.name}, validation" if len(runs) > 1 else "Validation"
        found.append((f"{name} at step {run.validation.step}", strips))
    return found


def _strip(title: str, file: VideoFile, run: Run, left: int) -> Strip:
    if 1.5 * len(file.data) > left:
        return Strip(f"{title}: too large for this page, see {run.folder}/validation", None)
    return Strip(title, picture(file, f"{title}, {run.name}"))


def picture(file: VideoFile, described: str) -> Picture:
    """A video and its middle frame, embedded."""
    moving = data_uri(MIME[file.suffix], file.data)
    return Picture(moving, data_uri("image/png", middle_frame(file)), file.suffix == ".mp4", described)


def middle_frame(file: VideoFile) -> bytes:
    frames = all_frames(file)
    frame = frames[len(frames) // 2]
    share = min(1.0, WIDEST_STILL / frame.width)
    return png(frame.reformat(round(frame.width * share), round(frame.height * share), format="rgb24"))


def all_frames(file: VideoFile) -> list[av.VideoFrame]:
    """Every frame of a video."""
    with av.open(io.BytesIO(file.data)) as container:
        return list(container.decode(video=0))


def png(frame: av.VideoFrame) -> bytes:
    """An RGB frame as a file."""
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = frame.width, frame.height, "rgb24"
    codec.time_base = frame.time_base or Fraction(1)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def _size(file: VideoFile) -> tuple[int, int]:
    with av.open(io.BytesIO(file.data)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


def _characters(one: Picture) -> int:
    return len(one.moving) + len(one.still)


def data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
