"""Ranges of numbers, and choices, that users give in configs (pydantic reads them) and as arguments of verbs.

An upper end is far above what anyone uses, and below what a library, a clock or a memory cannot take.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
"""Seed of random draws; there is none that means "any"."""
PositiveInt = Annotated[int, Interval(ge=1, le=10**9)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=10**9)]
PositiveFloat = Annotated[float, Interval(gt=0, le=1e9)]
NonNegativeFloat = Annotated[float, Interval(ge=0, le=1e9)]
Number = Annotated[float, Interval(ge=-1e9, le=1e9)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
LearningRate = Annotated[float, Interval(gt=0, le=1)]
RelativeDeviation = Annotated[float, Interval(ge=0.01, le=0.28)]
"""Width of an average over a run's length; the mean of all updates alike has 0.289."""
Beta = Annotated[float, Interval(ge=0, lt=1)]
"""Momentum of an optimizer, or decay of an average."""
Seconds = Annotated[float, Interval(ge=0, le=1e8)]
Pixels = Annotated[int, Interval(ge=1, le=16_384)]
Frames = Annotated[int, Interval(ge=1, le=100_000)]
Tokens = Annotated[int, Interval(ge=1, le=100_000)]
FrameRate = Annotated[float, Interval(gt=0, le=1000)]
"""Frames per second of a video that is read."""
WrittenRate = Annotated[int, Interval(ge=1, le=1000)]
"""Frames per second of a file that is written."""
Scale = Annotated[int, Interval(ge=1, le=64)]
"""Enlargement of every pixel."""
Steps = Annotated[int, Interval(ge=1, le=10_000)]
"""Network calls of a sampler."""
BatchSize = Annotated[int, Interval(ge=1, le=65_536)]
Width = Annotated[int, Interval(ge=1, le=65_536)]
"""Width of a layer, or rank of a change to it."""
Samples = Annotated[int, Interval(ge=1, le=1_000_000)]
"""Samples that are made and kept in memory."""
HeldOut = Annotated[int, Interval(ge=0, le=100_000)]
"""Prompts of the tiny world, none or some."""
Repeats = Annotated[int, Interval(ge=1, le=1000)]
"""Samples of one prompt."""
Threads = Annotated[int, Interval(ge=0, le=1024)]
Workers = Annotated[int, Interval(ge=1, le=1024)]
Processes = Annotated[int, Interval(ge=1, le=1_000_000)]
"""Processes of a run."""
Port = Annotated[int, Interval(ge=0, le=65_535)]
"""TCP port; 0 is any free one."""
GuidanceScale = Annotated[float, Interval(ge=0, le=1000)]
Bytes = Annotated[float, Interval(gt=0, le=1e18)]
"""Bytes, or bytes per second."""
Flops = Annotated[float, Interval(gt=0, le=1e21)]
OnSwitch = Literal["recache", "keep", "flush", "cut"]
"""Treatment of a stream's past when its prompt changes: ``recache`` computes it anew with the new prompt (LongLive,
arXiv 2509.22622), ``keep`` changes nothing, ``flush`` leaves the sink and the last chunk (Infinity-RoPE,
arXiv 2511.20649), ``cut`` begins an empty one."""
ON_SWITCH: OnSwitch = "flush"
"""That of streams unless said otherwise: a new prompt shows soonest of those that go on with the scene, at no cost."""
