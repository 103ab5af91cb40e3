"""The network call that families over a diffusers pipeline share: precision, features, flow maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fastvideo.distillation.adapters.base import DistillAdapter, Tokens, check_taps
from fastvideo.distillation.adapters.diffusers.flow_map import reading
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, PipelineSpec
from fastvideo.distillation.adapters.diffusers.scaling import DiffusersScaling
from fastvideo.distillation.adapters.diffusers.taps import tapped, tapped_early
from fastvideo.distillation.types import Condition


class DiffusersAdapter(DistillAdapter[ConfigT]):
    """A family whose weights are a diffusers pipeline folder; heavy parts are loaded on first use."""

    supports = frozenset({"features", "flow_map", "jvp"})
    _spec: ClassVar[PipelineSpec]

    def __init__(self, config: ConfigT, device: torch.device | str = "cpu", *, whole_forwards: bool = False) -> None:
        super().__init__(config, device, whole_forwards=whole_forwards)
        self._pipeline = Pipeline(self._spec, config, self.device)

    @cached_property
    def scaling(self) -> DiffusersScaling:
        return DiffusersScaling(self._pipeline, self.config.max_sequence_length)

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        """Heads times head width, for every layer: how diffusers' transformers name it."""
        config = self._pipeline.network_config()
        return (int(config["num_attention_heads"]) * int(config["attention_head_dim"]),) * int(config["num_layers"])

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[int],
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, Tokens]:
        check_taps(taps, self.feature_widths, type(self).__name__)
        blocks = getattr(network, self._spec.blocks)

        def call() -> Tensor:
            return self.velocity(network, x_t, t, condition)

        if not (whole or self._whole_forwards):
            return None, tapped_early(call, blocks, taps)
        u, tokens = tapped(call, blocks, taps)
        tokens = self.scaling.join_tokens(network, tokens)
        if self._whole_forwards:
            # In backward a split network is gathered when the gradient of its prediction comes, so one has to come.
            tokens = (tokens[0] + 0.0 * u.mean(), *tokens[1:])
        return (u if whole else None), tokens

    def _reading(self, network: nn.Module, span: Tensor | None) -> AbstractContextManager[None]:
        """Calls inside read ``span`` = ``t - r`` beside their times."""
        return reading(network, self._spec.time_embedding, span)

    def _autocast(self, x_t: Tensor) -> torch.autocast:
        """Autocast as configured, but for a derivative: bfloat16 would leave mostly noise of it (arXiv 2410.11081)."""
        derived = unpack_dual(x_t).tangent is not None  # type: ignore[no-untyped-call]
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16" and not derived
        )
