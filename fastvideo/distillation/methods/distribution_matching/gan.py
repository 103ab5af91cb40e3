"""Adversarial terms on noised latents (LADD arXiv 2403.12015; approximate R1: APT arXiv 2501.08316).

The discriminator is a role: it separates noised real latents from noised samples of the student by features of another
role, the backbone. Methods combine these parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fastvideo.distillation.bundle import RoleHandle, frozen
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.features import features, widths_of
from fastvideo.distillation.methods.distribution_matching.discriminator import Discriminator, taps_at
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Condition, RoleLoss
from fastvideo.ranges import LearningRate, NonNegativeFloat, PositiveFloat
from fastvideo.sampling_ranges import Width

GanLoss = Literal["softplus", "hinge"]
Depth = Annotated[float, Field(gt=0.0, le=1.0)]


def discriminator_loss(fake: Tensor, real: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """``mean softplus(fake) + mean softplus(-real)``, or the hinge ``mean relu(1 + fake) + mean relu(1 - real)``."""
    if kind == "hinge":
        return functional.relu(1 + fake).mean() + functional.relu(1 - real).mean()
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def generator_loss(fake: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """Non-saturating ``mean softplus(-fake)``, or the hinge's ``-mean fake``."""
    return -fake.mean() if kind == "hinge" else functional.softplus(-fake).mean()


def told_apart(fake: Tensor, real: Tensor) -> Tensor:
    """Share of pairs whose real sample has the higher logit: 0.5 is a coin, below it the heads trail the student."""
    return (real > fake).float().mean()


def approximate_r1(logits: Tensor, moved: Tensor, sigma: float) -> Tensor:
    """``mean ((D(x) - D(x + sigma n)) / sigma)^2``, which tends to R1's ``E |dD/dx|^2`` without second derivatives."""
    return ((logits - moved) / sigma).square().mean()


class AdversaryConfig(MethodConfig):
    """Options of every method with a discriminator."""

    gan_loss: GanLoss = "softplus"
    """`softplus` (non-saturating) or `hinge`."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight of the approximate R1 penalty, whose difference is divided by `r1_sigma`: APT's weight times `r1_sigma`
    squared. 0 disables it."""
    r1_sigma: PositiveFloat = 0.1
    """Standard deviation of the noise that the penalty adds to the discriminator's input."""
    feature_depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = (0.5, 0.75, 1.0)
    """Depths of the feature taps, relative to the network's: 1 is after its last block."""
    head_width: Width = 64
    """Hidden width of each head."""
    discriminator_learning_rate: LearningRate = 1e-5
    """AdamW learning rate of the discriminator."""

    @property
    def backbone(self) -> str:
        """Role whose features the heads read."""
        return "teacher"


class Adversary:
    """Discriminator ``heads`` on the features of a ``backbone`` role; ``rng`` draws the penalty's noise."""

    def __init__(self, config: AdversaryConfig, backbone: RoleHandle, heads: RoleHandle, rng: RandomStreams) -> None:
        self.config, self.backbone, self.heads, self.rng = config, backbone, heads, rng
        self.taps = taps_at(config.feature_depths, len(widths_of(backbone.adapter)))

    @staticmethod
    def build(config: AdversaryConfig, family: Family) -> nn.Module:
        """Network of the discriminator for a backbone of a family."""
        widths = widths_of(family)
        return Discriminator([widths[tap] for tap in taps_at(config.feature_depths, len(widths))], config.head_width)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that the student's adversarial loss must not train: heads and backbone."""
        return self.heads.name, self.backbone.name

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze heads and backbone: gradient flows through them and not to them."""
        return frozen((self.heads, self.backbone))

    def logits(self, features: Sequence[Tensor], t: Tensor, condition: Condition) -> Tensor:
        """Logits ``[B, taps]`` of a backbone's tokens."""
        return self.heads.network(features, t, condition.given)  # type: ignore[no-any-return]

    def judge(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits of noised latents."""
        return self.logits(features(self.backbone, x_t, t, condition, self.taps), t, condition)

    def see(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """:meth:`judge` without gradient to latents or backbone."""
        with torch.no_grad():
            tokens = features(self.backbone, x_t, t, condition, self.taps)
        return self.logits(tokens, t, condition)

    def loss(self, x0: Tensor, real: Tensor, t: Tensor, condition: Condition) -> RoleLoss:
        """Discriminator's loss on ``x0`` against ``real``, both at time ``t`` with the same noise."""
        noise = self.rng.normal_like(x0)
        fake_logits = self.see(add_noise(x0, noise, t), t, condition)
        real_t = add_noise(real, noise, t)
        real_logits = self.see(real_t, t, condition)
        loss = discriminator_loss(fake_logits, real_logits, self.config.gan_loss)
        metrics = {
            "real_logit": real_logits.detach().mean(),
            "fake_logit": fake_logits.detach().mean(),
            "told_apart": told_apart(fake_logits, real_logits),
        }
        if self.config.r1_weight:
            moved = self.see(real_t + self.config.r1_sigma * self.rng.normal_like(real_t), t, condition)
            penalty = approximate_r1(real_logits, moved, self.config.r1_sigma)
            loss = loss + self.config.r1_weight * penalty
            metrics["r1"] = penalty.detach()
        return RoleLoss("discriminator", loss, metrics)
