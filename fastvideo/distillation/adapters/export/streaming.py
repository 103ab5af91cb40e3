"""Streaming students in Self-Forcing's own code and in FastVideo: their classes, noise levels and numbers of frames.

Both sample a chunk at a time through a cache of keys, re-noise between two calls and commit the clean chunk, as our own
loop does. They name noise levels by whole steps of 1000 under a shift, and count the current chunk in the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo.distillation.adapters.export.base import StreamingClasses, deviation
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.noise import shift_time

TRAIN_STEPS = 1000
"""Entries of their tables of noise levels."""
SHIFTS = (5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 10.0, 12.0)
"""Shifts that are tried; the first is the published one, and wins where several do equally well."""
PUBLISHED_STEPS, PUBLISHED_SHIFT = (1000, 750, 500, 250), SHIFTS[0]
"""Steps of FastVideo's own config, which it takes unless told otherwise."""
WHOLE_PAST = 21
"""Latent frames that both keep for a network that sees its whole past (81 video frames)."""
TEXT_LENGTH = 512
"""Tokens to which both pad prompts with zeros."""


@dataclass(frozen=True)
class WarpedSteps:
    """Noise levels as whole ``steps`` of :data:`TRAIN_STEPS` under a ``shift``; ``times`` are the levels they give."""

    shift: float
    steps: tuple[int, ...]

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(shift_time(step / TRAIN_STEPS, self.shift) for step in self.steps)


def warped_steps(times: Sequence[float]) -> WarpedSteps:
    """The shift and the steps that come nearest to a ladder; a published ladder is met exactly, any to 0.0005."""
    candidates = [WarpedSteps(shift, _steps(times, shift)) for shift in SHIFTS]
    return min(candidates, key=lambda found: round(deviation(found.times, times), 9))


def _steps(times: Sequence[float], shift: float) -> tuple[int, ...]:
    return tuple(max(1, round(TRAIN_STEPS * shift_time(time, 1 / shift))) for time in times)


def visible_frames(reach: Reach, frames: int) -> int:
    """``local_attn_size``: frames that a chunk sees, its own and the sink included; -1 for the whole past.

    Args:
        reach: the student's.
        frames: latent frames of its videos in training.
    """
    if reach.window is not None:
        return reach.sink + reach.window + reach.chunk
    return -1 if frames <= WHOLE_PAST else frames


def fastvideo_network(classes: StreamingClasses, reach: Reach, frames: int) -> dict[str, Any]:
    """Fields of ``transformer/config.json`` that make FastVideo's network causal."""
    moves = reach.sink and reach.positions == "window"  # without a sink distances are the same either way
    return {
        "_class_name": classes.network,
        "num_frames_per_block": reach.chunk,
        "local_attn_size": visible_frames(reach, frames),
        "sink_size": reach.sink,
        "sliding_window_num_frames": WHOLE_PAST,
        "rope_cache_policy": "relativistic" if moves else "absolute",
    }


def fastvideo_scheduler(classes: StreamingClasses, shift: float) -> dict[str, Any]:
    """``scheduler_config.json`` with a table of :data:`TRAIN_STEPS` levels from 1 to just above 0."""
    return {
        "_class_name": classes.scheduler,
        "num_inference_steps": TRAIN_STEPS,
        "num_train_timesteps": TRAIN_STEPS,
        "shift": shift,
        "sigma_max": 1.0,
        "sigma_min": 0.0,
        "extra_one_step": True,
    }


def self_forcing_config(reach: Reach, frames: int, steps: WarpedSteps, context_time: float) -> Mapping[str, Any]:
    """Config for Self-Forcing's ``inference.py``, over its defaults."""
    size = {"local_attn_size": visible_frames(reach, frames), "sink_size": reach.sink}
    return {
        "denoising_step_list": list(steps.steps),
        "warp_denoising_step": True,
        "num_frame_per_block": reach.chunk,
        "independent_first_frame": False,
        "context_noise": round(TRAIN_STEPS * context_time),
        "model_kwargs": {"timestep_shift": steps.shift, **size},
    }
