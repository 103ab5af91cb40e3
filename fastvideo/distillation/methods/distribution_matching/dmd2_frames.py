"""DMD2 with a second teacher that sees single frames: appearance from images, motion from videos.

The video term is DMD2 (arXiv 2405.14867). The frame term is the same loss on frames of the student's sample, in the
space of a frame teacher and its critic, which may be of a family of images (a frame score beside a video term: AVDM2,
arXiv 2412.05899). Both gradients meet at the student's sample: ``loss = <video_weight g_v + frame_weight g_f, x0>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.frame_bridge import FrameBridge, FrameUse
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.dmd2_frames_config import DMD2FramesConfig
from fastvideo.distillation.methods.distribution_matching.frame_admission import errors_on_real_frames
from fastvideo.distillation.methods.distribution_matching.frame_term import FrameTerm, Seen
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, RoleLoss

TINY = 1e-12
"""Norm below which a gradient counts as none."""


class DMD2FramesMethod(DMD2Method):
    """Student, frozen teacher, critic, frozen frame teacher, frame critic."""

    Config = DMD2FramesConfig
    config: DMD2FramesConfig
    trainable_roles = ("student", "critic", "frame_critic")
    frozen_roles: ClassVar[tuple[str, ...]] = ("teacher", "frame_teacher")
    term_roles: ClassVar[tuple[str, ...]] = ("frame_teacher", "frame_critic")
    following_roles = ("critic", "frame_critic")
    bridges = False
    summary = "DMD2 with a second teacher, of images, on single frames (arXiv 2405.14867, 2412.05899)"

    def __init__(self, config: DMD2FramesConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        bridge = bundle.bridge("student", "frame_teacher")
        bridge = bridge if isinstance(bridge, FrameBridge) else FrameBridge()
        self.term = FrameTerm(config, bridge, bundle["frame_teacher"], bundle["frame_critic"], rng)
        self.errors = torch.zeros(4, dtype=torch.float64)
        """Sums of :func:`errors_on_real_frames` before the frame term is switched on."""
        self.balance: Tensor | None = None
        """Norm of the frame term's gradient over that of the video term's, in the last step that had both."""

    @classmethod
    def frames_of(cls, config: DMD2Config) -> FrameUse:
        assert isinstance(config, DMD2FramesConfig)
        return FrameUse(
            roles=("frame_teacher", "frame_critic"),
            space=config.frame_space,
            count=config.frames_per_video,
            first=config.first_frame,
            times=config.frame_time_range,
            resize=config.allow_resize,
        )

    @classmethod
    def optimizers(cls, config: DMD2Config) -> Mapping[str, OptimizerConfig]:
        assert isinstance(config, DMD2FramesConfig)
        options = super().optimizers(config)
        rate = {"learning_rate": config.frame_critic_learning_rate}
        return {**options, "frame_critic": options["critic"].model_copy(update=rate)}

    @classmethod
    def uses_latents(cls, config: DMD2Config) -> bool:
        assert isinstance(config, DMD2FramesConfig)
        return super().uses_latents(config) or not config.trust_frame_teacher

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """The student's loss on its steps; both critics' on the same sample and frames, detached, on their own."""
        active = self.active_roles(step)
        student_step = "student" in active
        with torch.set_grad_enabled(student_step):
            x0, batch = self.sample(batch)
        joined = student_step and self.config.frame_weight > 0 and step >= self.config.frame_warmup_steps
        leaf = x0.detach().requires_grad_(joined)
        seen = self.term.frames(leaf, batch, gradient=joined)
        if student_step:
            yield self.joined_loss(x0, leaf, seen, batch) if joined else self.video_loss(x0, batch)
        if "critic" in active:
            yield from self.critic_losses(x0.detach(), batch)
            yield self.term.critic_loss(seen.stills.latents.detach(), seen)
        if self.tests_teacher(step):
            self.errors = self.errors.to(x0.device) + errors_on_real_frames(self.term, batch)

    def video_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """DMD2's loss alone."""
        loss = self.student_loss(x0, batch)
        return RoleLoss("student", self.config.video_weight * loss.value, {**loss.metrics, **motion(x0)})

    def joined_loss(self, x0: Tensor, leaf: Tensor, seen: Seen, batch: Batch) -> RoleLoss:
        """Both terms, whose gradients are taken at ``leaf``, the detached sample that ``seen`` was made of."""
        with torch.enable_grad():
            video, frame = self.student_loss(leaf, batch), self.term.loss(seen)
        own = self.config.video_weight * torch.autograd.grad(video.value, leaf)[0]
        pulled = self.config.frame_weight * torch.autograd.grad(frame, leaf)[0]
        value = self.config.video_weight * video.value.detach() + self.config.frame_weight * frame.detach()
        loss = value + ((own + pulled) * (x0 - x0.detach())).sum()
        figures = {**seen.stills.figures, **self.balance_of(own[: seen.videos], pulled[: seen.videos]), **motion(x0)}
        return RoleLoss("student", loss, {**video.metrics, "frame_loss": frame.detach(), **figures})

    def balance_of(self, own: Tensor, pulled: Tensor) -> dict[str, Tensor]:
        """Norms of both gradients at the student's sample, of the videos whose frames are scored, and their cosine."""
        norms = own.norm(), pulled.norm()
        self.balance = norms[1] / norms[0].clamp_min(TINY)
        cosine = (own * pulled).sum() / (norms[0] * norms[1]).clamp_min(TINY)
        return {"video_gradient": norms[0], "frame_gradient": norms[1], "gradient_cosine": cosine}

    def tests_teacher(self, step: int) -> bool:
        """True in the second half of the steps before the frame term is switched on."""
        warmup = self.config.frame_warmup_steps
        return not self.config.trust_frame_teacher and warmup // 2 <= step < warmup

    def state_dict(self) -> dict[str, Any]:
        return {"frame_errors": self.errors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.errors = state["frame_errors"]


@torch.no_grad()
def motion(x0: Tensor) -> dict[str, Tensor]:
    """Rms difference of neighbouring latent frames of ``x0`` ``[B, C, F, H, W]``; nothing for stills."""
    if x0.shape[2] == 1:
        return {}
    return {"motion": (x0[:, :, 1:] - x0[:, :, :-1]).square().mean().sqrt()}
