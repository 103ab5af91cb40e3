"""A teacher's stored trajectory: what data holds of it, and what a method trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STATES, STATE_TIMES = "trajectory", "trajectory_times"
"""Names of a teacher's trajectory among the extras of a ``RawBatch``."""
TrajectoryKind = Literal["bidirectional", "causal"]
"""Trajectories of whole videos, or of chunks that each went on from clean data."""


@dataclass(frozen=True)
class Trajectory:
    """States ``[B, K, C, F, H, W]`` of a teacher on the way from noise to a batch's data.

    ``times`` are their rectified-flow times, float32 ``[B, K]`` on the CPU.
    """

    states: Tensor
    times: Tensor

    @classmethod
    def of(cls, extras: Mapping[str, Tensor], device: torch.device) -> Trajectory | None:
        """Trajectory among a raw batch's extras, moved to the device; ``None`` if there is none."""
        if STATES not in extras:
            return None
        return cls(extras[STATES].to(device, torch.float32, non_blocking=True), extras[STATE_TIMES].float())
