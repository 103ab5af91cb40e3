"""A stream to a file: frames are written as they come, and what is there when a signal comes is a whole video."""

from __future__ import annotations

from pathlib import Path

from fastvideo.data.video_io import VideoWriter, writing_video
from fastvideo.errors import UserError
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.stream_stats import StreamStats
from fastvideo.inference.switch_plan import SwitchPlan
from fastvideo.inference.video_stream import VideoStream
from fastvideo.stopping import Stopped, listening
from fastvideo.wording import counted

SIGNALS = ("SIGINT", "SIGTERM")


def write_stream(stream: VideoStream, plan: SwitchPlan, frames: int, out: Path, fps: int, scale: int) -> StreamStats:
    """Write a stream of ``frames`` video frames to ``out``; only a chunk is in memory.

    Raises:
        UserError: if the file cannot be written; a file that was there then stays.
        Stopped: after a signal; the file holds the chunks until then, or is as it was if there is none.
    """
    stopped = None
    try:
        with listening(SIGNALS), writing_video(out, fps, scale) as writer:
            try:
                _write(stream, plan, frames, writer)
            except Stopped as stop:
                if not stream.frames:
                    raise Stopped(stop.number, f"before the first frames; {out} was not written") from stop
                stopped = stop
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    if stopped is not None:
        done = f"{stream.frames} of {counted(frames, 'frame')}"
        raise Stopped(stopped.number, f"after {done}, which {out} holds: it plays")
    return stream.stats


def _write(stream: VideoStream, plan: SwitchPlan, frames: int, writer: VideoWriter) -> None:
    with PatientBar("streaming", frames) as bar:
        while stream.frames < frames:
            if prompt := plan.prompts.get(stream.frames):
                stream.prompt(prompt, plan.on_switch)
            chunk = next(stream)
            writer.write(chunk)
            bar(len(chunk))
