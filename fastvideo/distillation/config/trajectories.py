"""Options of a method that learns on a teacher's stored trajectories: which it wants and accepts."""

from __future__ import annotations

from collections.abc import Sequence

from fastvideo.distillation.config.base import Guidance, MethodConfig
from fastvideo.distillation.trajectory import TrajectoryKind
from fastvideo.ranges import Steps


class TrajectoryOptions(MethodConfig):
    """Options of a method with ``needs_trajectories``, as `fastvideo precompute-trajectories` reads them too."""

    teacher_path: str | None = None
    """Weights of the teacher; the model's own path if not given."""
    teacher_guidance: Guidance = 6.0
    """Guidance of the teacher's trajectory in the standard convention; the student learns it in."""
    teacher_steps: Steps = 48
    """Euler steps of the teacher's trajectory, at the times of the family's sampler; the ladder's times are added."""

    @property
    def trajectory_kinds(self) -> tuple[TrajectoryKind, ...]:
        """Kinds of stored trajectories that are trained on."""
        return ("bidirectional",)

    def stored_times(self, ladder: Sequence[float]) -> tuple[float, ...]:
        """Falling times in (0, 1] of the stored states, beside the end: the ``ladder``'s, which must then stay.

        ``(1.0,)`` stores the noise alone, for pairs of noise and sample that serve any ladder.
        """
        return tuple(ladder)
