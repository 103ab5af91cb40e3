"""Seams: jerks of the motion where one chunk ends and the next begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvideo.distillation.chunks import Reach, spans
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.evaluation.statistics import Estimate, estimate
from fastvideo.evaluation.streams.motion import steps, wrapped
from fastvideo.evaluation.streams.observer import SeenStreams
from fastvideo.tiny.world import SIZE


def seam_frames(frames: int, reach: Reach, temporal: int) -> tuple[int, ...]:
    """First video frames of all chunks but the first.

    Args:
        frames: video frames.
        temporal: video frames per latent frame but the first.
    """
    latents = latent_frames(frames, temporal)
    return tuple(first_frame(start, temporal) for start, _ in spans(latents, reach.chunk)[1:])


def seam_figures(seen: SeenStreams, seams: Sequence[int], counts: Tensor) -> dict[str, Estimate]:
    """Jerks over seams, relative to those inside of chunks: 1 for a stream without seams.

    ``seam_acceleration``: RMS change of the displacement where one of the two crosses a seam, over the others.
    ``seam_jump``: RMS error of a displacement as predicted from those on both sides, over a seam and over the others;
    ``seam_jump_pixels``: its numerator.
    """
    moved = steps(seen.positions, SIZE)
    crossing = torch.zeros(moved.shape[1], dtype=torch.bool)
    crossing[[seam - 1 for seam in seams]] = True
    change = wrapped(moved.diff(dim=1), SIZE).square().sum(-1)
    touched = crossing[1:] | crossing[:-1]
    error = wrapped(moved[:, 1:-1] - (moved[:, :-2] + moved[:, 2:]) / 2, SIZE).square().sum(-1)
    at, inside = crossing[1:-1], ~(crossing[1:-1] | crossing[:-2] | crossing[2:])
    return {
        "seam_acceleration": _ratio(change[:, touched], change[:, ~touched], counts),
        "seam_jump": _ratio(error[:, at], error[:, inside], counts),
        "seam_jump_pixels": _root(error[:, at], counts),
    }


def _ratio(above: Tensor, below: Tensor, counts: Tensor) -> Estimate:
    """Ratio of two roots of mean squares."""
    (top, tops), (bottom, bottoms) = _means(above, counts), _means(below, counts)
    return estimate((top / bottom) ** 0.5 if bottom else float("nan"), (tops / bottoms).sqrt(), len(above))


def _root(squares: Tensor, counts: Tensor) -> Estimate:
    mean, means = _means(squares, counts)
    return estimate(mean**0.5, means.sqrt(), len(squares))


def _means(squares: Tensor, counts: Tensor) -> tuple[float, Tensor]:
    """Mean of ``[N, K]``, and of its resamples ``[R]``; NaN entries are left out, and NaN is the mean of nothing."""
    known = ~squares.isnan()
    sums, sizes = squares.double().nan_to_num(0.0).sum(1), known.double().sum(1)
    return float(sums.sum() / sizes.sum()), (counts @ sums) / (counts @ sizes)
