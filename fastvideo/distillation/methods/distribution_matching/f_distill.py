"""f-distill: DMD2 for any f-divergence, by a weight per sample (arXiv 2502.15681, equation 6).

``grad D_f(p || q) = -E_q[ h(r) (s_p - s_q) dx / dtheta ]`` with ``r = p / q`` at the noised sample and
``h(r) = f''(r) r^2``. The optimal discriminator's logit is ``log r``. The reverse KL has ``h = 1``: bit-equal to
DMD2 with a discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.methods.distribution_matching.dmd2_gan import DMD2GANConfig, DMD2GANMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Beta, NonNegativeFloat, PositiveInt

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"
]
WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""``h(r)`` of each divergence up to a factor, which the normaliser cancels."""
MAX_LOGIT = 10.0
RATIOS = (0.1, 20.0)
"""Range to which ratios are clamped, against an overconfident discriminator."""


class FDistillConfig(DMD2GANConfig):
    """Options of f-distill."""

    divergence: Divergence = "jensen_shannon"
    """Objective. `forward_kl` and `jeffreys` cover modes, `reverse_kl` (plain DMD2) seeks them."""
    ratio_bins: PositiveInt = 10
    """Bins of the noise level, each with its own mean ratio."""
    ratio_decay: Beta = 0.9
    """Decay per student step of a bin's mean ratio (over this process's samples). At 0 it is the batch's own mean, and
    a sample alone in its bin always weighs 1."""
    gan_weight: NonNegativeFloat = 0.001
    """Weight of the adversarial term beside the DMD term; the ratio needs the discriminator even at 0."""


class FDistillMethod(DMD2GANMethod):
    """DMD2 with a discriminator that also gives weights."""

    Config = FDistillConfig
    config: FDistillConfig
    summary = "DMD2 for any f-divergence: a discriminator weighs the samples (arXiv 2502.15681)"

    def __init__(self, config: FDistillConfig, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        super().__init__(config, bundle, ladder, rng)
        self.means = torch.zeros(config.ratio_bins)  # 0: nothing seen yet

    @torch.no_grad()
    def weights(self, logits: Tensor, t: Tensor) -> Tensor:
        """``h(r)`` per sample, scaled to mean 1 over the batch: ``[B, 1, 1, 1, 1]``.

        Raises:
            UserError: for a batch of one, whose weight is always 1.
        """
        if len(logits) == 1:
            raise UserError("f_distill weighs samples against each other: data.batch_size must be above 1")
        ratio = logits.float().mean(1).clamp(-MAX_LOGIT, MAX_LOGIT).exp().clamp(*RATIOS)
        h = WEIGHTS[self.config.divergence](self.normalised(ratio, t))
        return (h / h.mean()).view(-1, 1, 1, 1, 1)

    def normalised(self, ratio: Tensor, t: Tensor) -> Tensor:
        """``ratio`` divided by the running mean of its noise bin, since ``E_q[p / q] = 1`` at every level."""
        self.means = self.means.to(ratio.device)
        bins = (t * len(self.means)).long().clamp_max(len(self.means) - 1)
        count = torch.zeros_like(self.means).index_add_(0, bins, torch.ones_like(ratio))
        batch = torch.zeros_like(self.means).index_add_(0, bins, ratio) / count
        mixed = batch.lerp(self.means, self.config.ratio_decay)
        self.means = torch.where(count == 0, self.means, torch.where(self.means == 0, batch, mixed))
        return ratio / self.means[bins]

    def state_dict(self) -> dict[str, Any]:
        return {"ratio_means": self.means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = state["ratio_means"]
