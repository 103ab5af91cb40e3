"""Streams on the page: curves along them with intervals, and frames far apart side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import av
import numpy as np

from fastvideo.evaluation.charts import Banded, band_chart, series_class
from fastvideo.evaluation.figures import Entry, Group
from fastvideo.evaluation.report_media import all_frames, data_uri, png
from fastvideo.evaluation.report_run import SMALL, VideoFile

CHARTS = {
    "digit": ("Right digit", ""),
    "colour": ("Right colour", ""),
    "direction": ("Right direction", ""),
    "frechet": ("Fréchet distance", "lower is better"),
    "speed": ("Speed", "over the first window's"),
    "turn": ("Turn", "degrees from the first direction"),
    "frozen": ("Standing still", "share of streams"),
    "runaway": ("Running away", "share of streams"),
    "identity": ("Change of looks", "over that of real streams"),
    "ink": ("Brightness", "mean light"),
    "saturation": ("Saturation", "chroma over light"),
    "frechet_bias": ("Exposure bias: Fréchet", "own past minus real past"),
    "digit_bias": ("Exposure bias: digit", "own past minus real past"),
    "colour_bias": ("Exposure bias: colour", "own past minus real past"),
    "direction_bias": ("Exposure bias: direction", "own past minus real past"),
}
"""Title and note of each curve, in the order of the page."""
SHOWN_FRAMES = (1, 33, 65, 129, 257, 513)
"""Frames of a strip, from 1, as far as there are any; the last one always."""
STRIP_PROMPTS = 3
GAP = 2
"""Pixels between the frames of a strip."""


class FrameStrip(NamedTuple):
    """``pictures`` frames of one stream side by side, as a data URI, and how to enlarge them."""

    title: str
    image: str
    rendering: str
    pictures: int


def stream_charts(groups: Sequence[Group], alone: bool) -> list[tuple[str, list[str]]]:
    """Charts of each group's streams, under the names of its runs if there are several groups."""
    found = []
    for group in groups:
        if entries := _streams(group):
            title = ", ".join(run.name for run in group.runs) if len(groups) > 1 else ""
            found.append((title, [chart for name in CHARTS if (chart := _chart(name, entries, alone))]))
    return found


def _streams(group: Group) -> list[Entry]:
    return [entry for entry in group.entries() if "series" in entry.row]


def _chart(name: str, entries: Sequence[Entry], alone: bool) -> str | None:
    """One curve per model, and that of real streams; ``None`` where no model has any."""
    lines = [(series_class(i), _name(entry, alone), entry.row["series"]) for i, entry in enumerate(entries)]
    curves = [Banded(title, style, points(series[name])) for style, title, series in lines if name in series]
    if not any(curve.points for curve in curves):
        return None
    if real := entries[0].row["series"].get(f"real_{name}"):
        curves.append(Banded("real", "real dashed", points(real)))
    return band_chart(*_titled(name, curves))


def _titled(name: str, curves: Sequence[Banded]) -> tuple[str, Sequence[Banded], str]:
    title, note = CHARTS[name]
    return title, curves, note


def _name(entry: Entry, alone: bool) -> str:
    return entry.title if entry.shared or alone else f"{entry.title}: {entry.run.name}"


def points(series: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """Frame, value, low and high of a curve of ``metrics.json``, frames from 1, where all are defined."""
    rows = zip(series["at"], series["value"], series["low"], series["high"], strict=True)
    return [(at + 1, value, low, high) for at, value, low, high in rows if None not in (value, low, high)]


def frame_strips(groups: Sequence[Group], alone: bool) -> list[tuple[str, list[FrameStrip]]]:
    """For the first prompts, a strip of every model's kept stream."""
    found: dict[str, list[FrameStrip]] = {}
    for entry in (entry for group in groups for entry in _streams(group)):
        kept = entry.run.gallery
        if kept is not None and entry.name in kept.rows:
            for prompt, file in list(zip(kept.prompts, kept.rows[entry.name], strict=True))[:STRIP_PROMPTS]:
                found.setdefault(prompt, []).append(strip(_name(entry, alone), file))
    return list(found.items())


def strip(title: str, file: VideoFile) -> FrameStrip:
    """Frames of a stream far apart, side by side."""
    frames = all_frames(file)
    numbers = sorted({number for number in SHOWN_FRAMES if number <= len(frames)} | {len(frames)})
    shown = [frames[number - 1].to_ndarray(format="rgb24") for number in numbers]
    gap = np.full((shown[0].shape[0], GAP, 3), 127, np.uint8)
    row = [part for image in shown for part in (image, gap)][:-1]
    image = png(av.VideoFrame.from_ndarray(np.ascontiguousarray(np.concatenate(row, axis=1)), format="rgb24"))
    rendering = "pixelated" if shown[0].shape[0] <= SMALL else "auto"
    return FrameStrip(
        f"{title}: frames {', '.join(map(str, numbers))}", data_uri("image/png", image), rendering, len(numbers)
    )
