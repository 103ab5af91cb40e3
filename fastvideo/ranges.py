"""Ranges of numbers that users give in configs (pydantic reads them) and as arguments of verbs.

An upper end is far above what anyone uses, and below what a library, a clock or a memory cannot take.
``sampling_ranges.py`` has those of sampling, datasets and services.
"""

from __future__ import annotations

from typing import Annotated

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
Steps = Annotated[int, Interval(ge=1, le=10_000)]
"""Network calls of a sampler."""
Threads = Annotated[int, Interval(ge=0, le=1024)]
Processes = Annotated[int, Interval(ge=1, le=1_000_000)]
"""Processes of a run."""
GuidanceScale = Annotated[float, Interval(ge=0, le=1000)]
Flops = Annotated[float, Interval(gt=0, le=1e21)]
