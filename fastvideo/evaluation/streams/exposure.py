"""Exposure bias: what a model makes of its own past, against what it makes of a real one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvideo.distillation.chunks import Reach, spans
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.evaluation.metrics import ATTRIBUTES, correctness
from fastvideo.evaluation.streams.drift import Comparison
from fastvideo.evaluation.streams.observer import SeenStreams
from fastvideo.evaluation.streams.series import Series, frechet_series, mean_series
from fastvideo.tiny.classifier import FRAMES


def exposure_places(frames: int, reach: Reach | None, temporal: int, stride: int) -> tuple[int, ...]:
    """First latent frames of chunks, about ``stride`` video frames apart, from which a window can be continued.

    The window is the last frame of the past and those after it; a model without chunks has no places.
    """
    if reach is None:
        return ()
    edges = [start for start, _ in spans(latent_frames(frames, temporal), reach.chunk)[1:]]
    starts = {edge: first_frame(edge, temporal) - 1 for edge in edges}
    fitting = [edge for edge in edges if starts[edge] + FRAMES <= frames]
    wanted = range(stride, frames - FRAMES + 1, stride)
    found = {next((edge for edge in fitting if starts[edge] >= frame), None) for frame in wanted}
    return tuple(sorted(edge for edge in found if edge is not None))


def exposure_series(
    starts: Sequence[int], own: SeenStreams, real: SeenStreams, against: Comparison
) -> dict[str, Series]:
    """Figures on the model's own past minus those on a real one, at windows that begin with the past's last frame.

    ``frechet_bias`` is above 0, and the accuracies' ``digit_bias``, ``colour_bias`` and ``direction_bias`` below, if a
    model suffers from its own errors.
    """
    both = [frechet_series(starts, seen.features, against.reference, against.counts) for seen in (own, real)]
    found = {"frechet_bias": both[0].minus(both[1])}
    right = [torch.stack([correctness(r, against.named) for r in seen.read.unbind(1)], dim=1) for seen in (own, real)]
    for place, name in enumerate(ATTRIBUTES):
        lines = [mean_series(starts, one[:, :, place], against.counts, highest=1.0) for one in right]
        found[f"{name}_bias"] = lines[0].minus(lines[1])
    return found
