"""DMD2 with its adversarial term (arXiv 2405.14867, section 4.3): real data corrects the teacher's errors.

The student's adversarial term reuses the backbone's call in the DMD gradient: it adds a backward pass and no forward.
Heads and backbone are frozen in that call and in its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.features import x0_guided_and_features
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.gan import Adversary, AdversaryConfig, generator_loss
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import NonNegativeFloat


class DMD2GANConfig(AdversaryConfig, DMD2Config):
    """Options of DMD2 and of its discriminator."""

    score_and_train: Annotated[bool, refused("features are read in the call that scores")] = False
    """Not possible here."""
    gan_weight: NonNegativeFloat = 0.03
    """Weight of the adversarial term beside the DMD term."""
    features_of: Literal["teacher", "critic"] = "teacher"
    """Source of the discriminator's features: the frozen `teacher`, or the moving `critic` (trained by its own loss
    only)."""

    @property
    def backbone(self) -> str:
        return self.features_of

    @model_validator(mode="after")
    def _critic_is_one(self) -> DMD2GANConfig:
        if self.critic_sees_rung and self.features_of == "critic":
            raise ValueError(
                "critic_sees_rung: real videos have no ladder step, and with features_of: critic the discriminator "
                "reads them through the critic; give features_of: teacher"
            )
        return self


class DMD2GANMethod(DMD2Method):
    """Student, frozen teacher, critic, discriminator."""

    Config = DMD2GANConfig
    config: DMD2GANConfig
    trainable_roles = ("student", "critic", "discriminator")
    term_roles = ("discriminator",)
    following_roles = ("critic", "discriminator")
    summary = "DMD2 with a discriminator on real data (arXiv 2405.14867)"

    def __init__(self, config: DMD2GANConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.adversary = Adversary(config, bundle[config.features_of], bundle["discriminator"], rng)

    @classmethod
    def optimizers(cls, config: DMD2Config) -> Mapping[str, OptimizerConfig]:
        assert isinstance(config, DMD2GANConfig)
        options = super().optimizers(config)
        rate = {"learning_rate": config.discriminator_learning_rate}
        return {**options, "discriminator": options["critic"].model_copy(update=rate)}

    @classmethod
    def heads(cls, config: DMD2Config, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        assert isinstance(config, DMD2GANConfig)
        return {"discriminator": Adversary.build(config, families[config.features_of])}

    @classmethod
    def uses_latents(cls, config: DMD2Config) -> bool:
        return True

    @classmethod
    def needs_of(cls, config: DMD2Config) -> frozenset[Need]:
        return super().needs_of(config) | {"features"}

    @classmethod
    def gradient_roles_of(cls, config: DMD2Config) -> tuple[str, ...]:
        assert isinstance(config, DMD2GANConfig)
        return ("teacher",) if config.features_of == "teacher" else ()

    def student_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """DMD loss, weighted per sample, plus the adversarial term at the same noised sample."""
        t = self.score_times(len(batch))
        x_t = add_noise(x0, self.rng.normal_like(x0), t)
        with self.adversary.frozen():
            real, fake, logits = self.score_and_features(x_t, t, batch)
        gradient = self.weights(logits, t) * self.gradient(x0.detach(), real, fake, batch)
        dmd = 0.5 * batch.mean((x0 - (x0 - gradient).detach()).square())
        gan = generator_loss(logits, self.config.gan_loss)
        metrics = {"dmd_gradient_rms": batch.mean(gradient.square()).sqrt(), "gan_loss": gan.detach()}
        return RoleLoss("student", dmd + self.config.gan_weight * gan, metrics, frozen=self.adversary.roles)

    def score_and_features(self, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Clean estimates of teacher (guided) and critic, without gradient, and logits ``[B, taps]`` with it."""
        condition, negative, taps = batch.condition, batch.negative, self.adversary.taps
        guidance = self.config.teacher_guidance
        if self.config.features_of == "teacher":
            real, seen = x0_guided_and_features(self.teacher, x_t, t, condition, negative, guidance, taps)
            with torch.no_grad():
                fake = self.critic.x0(x_t, t, condition, r=self.rungs.second_time(t))
        else:
            fake, seen = x0_guided_and_features(self.critic, x_t, t, condition, condition, 1.0, taps)
            with torch.no_grad():
                real = self.teacher.x0_guided(x_t, t, condition, negative, guidance)
        return real, fake, self.adversary.logits(seen, t, condition)

    def weights(self, logits: Tensor, t: Tensor) -> Tensor:
        """Weights ``[B, 1, 1, 1, 1]`` of the samples' DMD gradients: 1 for the reverse KL."""
        return torch.ones_like(t).view(-1, 1, 1, 1, 1)

    def critic_losses(self, x0: Tensor, batch: Batch) -> Iterator[RoleLoss]:
        """Losses of the critic and of the discriminator on the student's sample."""
        yield from super().critic_losses(x0, batch)
        yield self.discriminator_loss(x0, batch)

    def discriminator_loss(self, x0: Tensor, batch: Batch) -> RoleLoss:
        """Real latents against the student's sample, at newly drawn score times."""
        return self.adversary.loss(x0, self.to_teacher(batch.latents), self.score_times(len(batch)), batch.condition)
