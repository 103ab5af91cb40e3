"""Ranges of numbers, and choices, of sampling, datasets and services; ``ranges.py`` has those of training."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

FrameRate = Annotated[float, Interval(gt=0, le=1000)]
"""Frames per second of a video that is read."""
WrittenRate = Annotated[int, Interval(ge=1, le=1000)]
"""Frames per second of a file that is written."""
Scale = Annotated[int, Interval(ge=1, le=64)]
"""Enlargement of every pixel."""
BatchSize = Annotated[int, Interval(ge=1, le=65_536)]
Width = Annotated[int, Interval(ge=1, le=65_536)]
"""Width of a layer, or rank of a change to it."""
Samples = Annotated[int, Interval(ge=1, le=1_000_000)]
"""Samples that are made and kept in memory."""
HeldOut = Annotated[int, Interval(ge=0, le=100_000)]
"""Prompts of the tiny world, none or some."""
Repeats = Annotated[int, Interval(ge=1, le=1000)]
"""Samples of one prompt."""
Workers = Annotated[int, Interval(ge=1, le=1024)]
Port = Annotated[int, Interval(ge=0, le=65_535)]
"""TCP port; 0 is any free one."""
Bytes = Annotated[float, Interval(gt=0, le=1e18)]
"""Bytes, or bytes per second."""
OnSwitch = Literal["recache", "keep", "flush", "cut"]
"""Treatment of a stream's past when its prompt changes: ``recache`` computes it anew with the new prompt (LongLive,
arXiv 2509.22622), ``keep`` changes nothing, ``flush`` leaves the sink and the last chunk (Infinity-RoPE,
arXiv 2511.20649), ``cut`` begins an empty one."""
ON_SWITCH: OnSwitch = "flush"
"""That of streams unless said otherwise: a new prompt shows soonest of those that go on with the scene, at no cost."""
