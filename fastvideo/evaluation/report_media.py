"""Videos inside the page: moving by default, still on request, and in rows that wrap on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import av

from fastvideo.data.video_io import FORMATS
from fastvideo.evaluation.report_store import TINY, Clip

MOST_VIDEO_BYTES = 3_000_000
"""Characters of embedded videos: a page with its curves and configs stays below 5 MB."""
MOST_PROMPTS = 10
MOST_ABREAST = 8
"""Videos of one prompt that stand in one line under common headings; more of them wrap, each with its caption."""

MOTION = (
    '<div class="motion"><label class="pause"><input type="checkbox" id="pause"> Pause the videos</label>'
    '<label class="play"><input type="checkbox" id="play"> Play the videos</label></div>'
)
"""Stops the videos without a script; a reader who asked the system for less motion starts them instead."""


@dataclass(frozen=True)
class Column:
    """The videos of one model: heading, colour class, one clip per prompt."""

    title: str
    style: str
    clips: Sequence[Clip]


def gallery(prompts: Sequence[str], columns: Sequence[Column]) -> str:
    """Prompts down, models across; as many prompts as fit the page, and a line that says how many that are."""
    shown = prompts[:MOST_PROMPTS]
    rows: list[str] = []
    size = 0
    for index, prompt in enumerate(shown):
        row = _prompt_row(prompt, [(column, column.clips[index]) for column in columns])
        size += len(row)
        if size > MOST_VIDEO_BYTES:
            break
        rows.append(row)
    width, height = _size(columns[0].clips[0])
    look = f"--columns:{len(columns)};--aspect:{width}/{height};--rendering:{'pixelated' if height <= TINY else 'auto'}"
    many = " many" if len(columns) > MOST_ABREAST else ""
    heads = "".join(f"<span>{escape(column.title)}</span>" for column in columns)
    return (
        f'{MOTION}<div class="gallery{many}" style="{look}">'
        f'<div class="heads" aria-hidden="true"><span></span>{heads}</div>'
        f"{''.join(rows)}</div>{_cut(len(rows), len(shown))}"
    )


def _cut(fitting: int, wanted: int) -> str:
    if fitting == wanted:
        return ""
    text = f"{fitting} of {wanted} prompts: more would make this page too large. All are in the run's videos folder."
    return f'<p class="soft">{text}</p>'


def _prompt_row(prompt: str, cells: Sequence[tuple[Column, Clip]]) -> str:
    figures = "".join(
        f'<figure class="clip {column.style}">{moving_and_still(clip, f"{column.title}: {prompt}")}'
        f"<figcaption>{escape(column.title)}</figcaption></figure>"
        for column, clip in cells
    )
    return f'<div class="prompt"><h3>{escape(prompt)}</h3><div class="cells">{figures}</div></div>'


def moving_and_still(clip: Clip, described: str) -> str:
    """A looping video and its middle frame; the style sheet shows one of the two."""
    source = _data(FORMATS[clip.suffix].mime, clip.data)
    still = f'<img class="still" src="{_data("image/png", middle_frame(clip))}" alt="{escape(described)}, one frame">'
    if clip.suffix == ".mp4":
        attributes = "autoplay loop muted playsinline"
        return f'<video class="moving" src="{source}" aria-label="{escape(described)}" {attributes}></video>{still}'
    return f'<img class="moving" src="{source}" alt="{escape(described)}">{still}'


def middle_frame(clip: Clip) -> bytes:
    """The middle frame as a PNG file."""
    with av.open(io.BytesIO(clip.data)) as container:
        frames = list(container.decode(video=0))
    codec = av.CodecContext.create("png", "w")
    frame = frames[len(frames) // 2].reformat(format="rgb24")
    codec.width, codec.height, codec.pix_fmt = frame.width, frame.height, "rgb24"
    codec.time_base = frame.time_base
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def _size(clip: Clip) -> tuple[int, int]:
    with av.open(io.BytesIO(clip.data)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


def _data(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
