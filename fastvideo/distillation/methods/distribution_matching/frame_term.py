"""The frame term: DMD's loss on frames of the student's sample, in the space of a frame teacher and its critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.frame_bridge import FrameBridge, Picks, Stills
from fastvideo.distillation.methods.distribution_matching.dmd2 import dmd_gradient
from fastvideo.distillation.methods.distribution_matching.dmd2_frames_config import DMD2FramesConfig
from fastvideo.distillation.noise import add_noise, velocity_target
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch, Condition, RoleLoss, UserError

MARGIN = 0.05
"""Noise levels beyond those of the frame term on which the frame critic is trained, so that it has no edge there."""


@dataclass(frozen=True)
class Seen:
    """Frames with the conditions under which they are scored.

    Attributes:
        stills: the frames of ``videos`` samples, ``count`` of each.
        condition, negative: of each frame.
    """

    stills: Stills
    videos: int
    count: int
    condition: Condition
    negative: Condition


@dataclass(frozen=True)
class FrameTerm:
    """A frame teacher and the critic that follows the student's frames; ``bridge`` brings frames to their space."""

    config: DMD2FramesConfig
    bridge: FrameBridge
    teacher: RoleHandle
    critic: RoleHandle
    rng: RandomStreams

    def frames(self, x0: Tensor, batch: Batch, *, gradient: bool) -> Seen:
        """Some frames of the first samples of ``x0``, in the frame teacher's space."""
        videos = min(self.config.frame_videos, len(batch))
        picks, count = self.picks(videos, x0.shape[2]), self.config.frames_per_video
        with torch.set_grad_enabled(gradient):
            stills = self.bridge.stills(x0[:videos], picks)
        condition, negative = (
            Condition(each.rows(slice(0, videos)).map(lambda value: value.repeat_interleave(count, 0)).tensors)
            for each in (batch.condition, batch.negative)
        )
        return Seen(stills, videos, count, condition, negative)

    def picks(self, samples: int, frames: int) -> Picks:
        """Video frames of each sample: of different latent frames, evenly drawn, and evenly drawn in each of these.

        They decide how much is decoded, so they are equal on all processes.
        """
        if self.config.frames_per_video > frames:
            wanted = self.config.frames_per_video
            raise UserError(f"method.frames_per_video: {wanted}, and a video has {frames} latent frames")
        return [[self._video_frame(number) for number in self._latent_frames(frames)] for _ in range(samples)]

    def _latent_frames(self, frames: int) -> Sequence[int]:
        chosen = [0] if self.config.first_frame else []
        left = list(range(len(chosen), frames))
        while len(chosen) < self.config.frames_per_video:
            chosen.append(left.pop(self.rng.shared_index(len(left))))
        return chosen

    def _video_frame(self, number: int) -> int:
        temporal = self.bridge.temporal
        return 1 + (number - 1) * temporal + self.rng.shared_index(temporal) if number else 0

    def loss(self, seen: Seen) -> Tensor:
        """DMD's loss on frames: one noise level per video, noise and normaliser per frame."""
        x0 = seen.stills.latents
        with torch.no_grad():
            x_t, t, _ = self.noised(x0, seen, self.config.frame_time_range)
            fake = self.critic.x0(x_t, t, seen.condition)
            real = self.teacher.x0_guided(x_t, t, seen.condition, seen.negative, self.config.frame_guidance)
            gradient = self.gradient(x0, real, fake)
        return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()

    def gradient(self, x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """DMD gradient ``[N, C, 1, h, w]`` of the clean estimates."""
        return dmd_gradient(x0, real=real, fake=fake)

    def critic_loss(self, x0: Tensor, seen: Seen) -> RoleLoss:
        """Conditional flow matching on the student's frames, at all levels that the frame teacher knows."""
        x_t, t, noise = self.noised(x0, seen, self.critic_times)
        u = self.critic.velocity(x_t, t, seen.condition)
        return RoleLoss("frame_critic", (u - velocity_target(x0, noise)).square().mean())

    @property
    def critic_times(self) -> tuple[float, float]:
        """Levels of the critic: those of DMD2 as far as the frame teacher knows them, and beyond the frame term's."""
        (low, high), (least, most) = self.config.frame_time_range, self.config.score_time_range
        return max(0.0, min(least, low - MARGIN)), min(self.bridge.noisiest, max(most, high + MARGIN))

    def noised(self, x0: Tensor, seen: Seen, bounds: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t`` at one time per video, those times ``[N]``, and the noise of each frame."""
        t, noise = self.times(seen, bounds), self.noise(x0, seen)
        return add_noise(x0, noise, t), t, noise

    def times(self, seen: Seen, bounds: tuple[float, float]) -> Tensor:
        """One time per video, evenly drawn, for each of its frames."""
        t = bounds[0] + (bounds[1] - bounds[0]) * self.rng.uniform(seen.videos)
        return t.repeat_interleave(seen.count)

    def noise(self, x0: Tensor, seen: Seen) -> Tensor:
        """Noise of each frame of ``x0`` ``[N, C, 1, h, w]``."""
        shape, count = tuple(x0.shape[1:]), seen.count
        if self.config.share_frame_noise:
            return self.rng.normal((seen.videos, *shape), x0.dtype).repeat_interleave(count, 0)
        return self.rng.normal((seen.videos, count, *shape), x0.dtype).flatten(0, 1)
