"""Causal SFT: a bidirectional video model becomes one that continues a past, chunk by chunk.

``teacher`` forcing trains each chunk on the clean chunks before it (the teacher of Causal Forcing, arXiv 2602.02214);
``diffusion`` forcing (arXiv 2407.01392) on noisy ones, each chunk with a time of its own (CausVid, arXiv 2412.07772).
Both see all chunks of a video in one call.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastvideo.distillation.causal_rollout import forced
from fastvideo.distillation.chunks import Context, Masked, by_chunk, spans
from fastvideo.distillation.config.causal import ForcingOptions
from fastvideo.distillation.methods.fine_tuning.sft import SFTConfig, SFTMethod
from fastvideo.distillation.types import Batch, Need, RoleLoss
from fastvideo.ranges import Fraction, LearningRate, PositiveFloat


class CausalSFTConfig(ForcingOptions, SFTConfig):
    """Options of causal SFT."""

    bidirectional_share: Fraction = 0.0
    """Share of the batches on which a plain bidirectional step is taken, so that one network stays a bidirectional
    teacher too."""
    time_shift: PositiveFloat = 5.0
    """Shift of the training times, which are drawn per chunk."""
    learning_rate: LearningRate = 2e-6
    """AdamW learning rate."""


class CausalSFTMethod(SFTMethod):
    """One role, trained on data."""

    Config = CausalSFTConfig
    config: CausalSFTConfig
    summary = "chunk-causal fine-tuning: makes autoregressive teachers (arXiv 2407.01392, 2602.02214)"

    @classmethod
    def needs_of(cls, config: CausalSFTConfig) -> frozenset[Need]:  # type: ignore[override]
        """Times per frame too, for chunks that are noisy together."""
        return super().needs_of(config) | (frozenset({"frame_times"}) if config.forcing == "diffusion" else frozenset())

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        if self.rng.shared_uniform() < self.config.bidirectional_share:
            yield from super().losses(batch, step)
        else:
            yield self.causal_loss(batch)

    def causal_loss(self, batch: Batch) -> RoleLoss:
        """The loss of SFT with a time per chunk. Errors of the first and of the last chunk tell if the past is used."""
        chunk, x0 = self.config.reach.chunk, batch.latents
        noise, t = self.rng.normal_like(x0), by_chunk(self.times, x0, chunk)
        errors = self.errors(batch, noise, t, self.context(batch))
        if batch.condition.given is not None:
            return RoleLoss("student", batch.mean(errors))
        (_, first), *_ = spans(x0.shape[2], chunk)
        ends = {"first_chunk": errors[:, :, :first], "last_chunk": errors[:, :, -chunk:]}
        return RoleLoss("student", batch.mean(errors), {name: part.detach().mean() for name, part in ends.items()})

    def context(self, batch: Batch) -> Context:
        """The past of every chunk."""
        if self.config.forcing == "diffusion":
            return Masked(self.config.reach)
        return forced(self.config.reach, batch.latents, self.config.context_time, self.rng)
