"""The whole Wan family: Wan 2.1, 2.2 A14B and TI2V-5B, from text and images, at once or chunk by chunk.

Wan 2.2 A14B has two networks of 14B, one for high noise and one for low: they are one
:class:`~fastvideo.distillation.experts.Experts` here, so that roles, checkpoints and averages hold it like any network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, read_index
from fastvideo.distillation.adapters.diffusers.text_keys import (
    TextKeys,
    kept_keys,
    knowing,
    reads_text,
    share_keys,
)
from fastvideo.distillation.adapters.diffusers.view import Grid, View, check_causal, next_view, seeing, view_of
from fastvideo.distillation.adapters.wan import SPEC, TIME_UNITS, WanAdapter, WanConfig, WanFolder
from fastvideo.distillation.adapters.wan_family.frames import WanFrameCodec
from fastvideo.distillation.adapters.wan_family.images import IMAGE_EMBEDS, IMAGE_LATENTS, WanImageConditioner
from fastvideo.distillation.adapters.wan_family.inputs import SECOND, NetworkInputs, WanFamilyConfig, experts_in
from fastvideo.distillation.chunks import Context, Masked, Past, Piece, masked_runs, repeated
from fastvideo.distillation.experts import SUPPORTS, Experts, boundary_between, boundary_of, networks_of
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.types import Condition, UserError

TEXT_EMBEDDER = "condition_embedder.text_embedder"
"""Module that makes of a prompt what cross-attention reads."""


class WanFamily(DiffusersAdapter[WanConfig], WanAdapter):
    """Wan with images, two experts, streams, flow maps and features."""

    Config = WanFamilyConfig
    summary = "Wan 2.1, 2.2 A14B and TI2V-5B, from text and images: rectified flow, UMT5 text"
    supports = DiffusersAdapter.supports | {"frame_times", "chunks", "frames"}

    def __init__(self, config: WanConfig, device: torch.device | str = "cpu", *, whole_forwards: bool = False) -> None:
        super().__init__(config, device, whole_forwards=whole_forwards)
        if experts_in(self._pipeline.source) > 1:
            self.supports = SUPPORTS

    @cached_property
    def codec(self) -> WanFrameCodec:
        return WanFrameCodec(self._pipeline, NetworkInputs.read(self._pipeline))

    @cached_property
    def conditioner(self) -> WanImageConditioner:
        return WanImageConditioner(self._pipeline, self.codec)

    @cached_property
    def folder(self) -> WanFamilyFolder:
        return WanFamilyFolder(self._pipeline)

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        if isinstance(context, Masked):
            return self._masked(network, x_t, t, condition, context)
        if context is None:
            return self._call(network, x_t, t, condition, r=r)
        view, keys = next_view(network, context, x_t, Grid.of(network, x_t)), None
        if not torch.is_grad_enabled() or self._shares_graphs(network, context):
            keys = self._text_keys(network, context, x_t, condition)
        if keys is None or (context.shared is None and not keys.layers):
            return self._call(network, x_t, t, condition, view, r)
        u = self._call(network, x_t, t, condition, view, r, keys)
        share_keys(context, keys)
        return u

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        taken: list[tuple[Tensor, ...]] = []
        view = replace(next_view(network, past, x0, Grid.of(network, x0)), taken=taken)
        keys = self._text_keys(network, past, x0, condition)
        self._call(network, x0, full_time(x0, t), condition, view, keys=keys)
        return replace(past.add(Piece(past.length, x0, tuple(taken))), texts=keys)

    def _shares_graphs(self, network: Any, past: Past) -> bool:
        """True if calls with gradient share the keys of their prompts, with their graph.

        Split weights are gathered for the backward pass of one call, which must hold all of its graph; recomputation
        keeps nothing of a call, and would keep these. Both make them anew.
        """
        return past.shared is not None and not (self._whole_forwards or network.gradient_checkpointing)

    def _text_keys(self, network: nn.Module, past: Past, x: Tensor, condition: Condition) -> TextKeys | None:
        """Keys of the prompts that an earlier call kept, or new ones; ``None`` if the network keeps none."""
        own, casts = condition.of(self.conditioner.key), self._casts(network, x)
        kept = kept_keys(past)
        if kept is not None and kept.are_of(own[TEXT], casts):
            return kept
        return None if IMAGE_EMBEDS in own or not reads_text(network, SPEC.blocks) else TextKeys(own[TEXT], casts)

    def _masked(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, context: Masked) -> Tensor:
        """All chunks at once, the noisy half of ``[clean, noisy]`` under teacher forcing."""
        frames, clean = x_t.shape[2], context.clean
        runs = masked_runs(frames, context.reach, clean is not None)
        view = view_of(runs, Grid.of(network, x_t), x_t.device)
        if clean is None:
            return self._call(network, x_t, t, condition, view)
        both = repeated(condition)
        times = torch.cat([torch.full_like(t, context.clean_time), t], dim=1)
        return self._call(network, torch.cat([clean, x_t], dim=2), times, both, view)[:, :, frames:]

    def _call(
        self,
        network: Any,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        view: View | None = None,
        r: Tensor | None = None,
        keys: TextKeys | None = None,
    ) -> Tensor:
        if view is not None:
            check_causal(network, SPEC.blocks)
        span = None if r is None else t - r
        if span is not None and t.ndim == 2:
            span = _per_token(span, x_t, network)
        with self._reading(network, span), seeing(network, view), knowing(network, TEXT_EMBEDDER, keys):
            return super().velocity(network, x_t, t, condition)

    def _inputs(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """With times per token where those of a sample differ, and with the image of a checkpoint that reads one."""
        x, timestep, text = super()._inputs(network, x_t, t, condition)
        own = condition.of(self.conditioner.key)
        if t.ndim == 2:
            timestep = _per_token(timestep, x_t, network)
        if IMAGE_LATENTS in own:
            x = torch.cat([x, self._input(network, own[IMAGE_LATENTS])], dim=1)
        image = (self._input(network, own[IMAGE_EMBEDS]),) if IMAGE_EMBEDS in own else ()
        return x, timestep, text, *image


def _per_token(times: Tensor, x_t: Tensor, network: Any) -> Tensor:
    """Per-frame times ``[B, F]`` as the per-token times that the network takes."""
    frames, height, width = network.config.patch_size
    tokens = (x_t.shape[3] // height) * (x_t.shape[4] // width)
    return times[:, ::frames].repeat_interleave(tokens, dim=1)


class WanFamilyFolder(DiffusersFolder[WanConfig], WanFolder):
    """A Wan pipeline with one network or two experts."""

    config: WanFamilyConfig

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        super().__init__(pipeline)
        if (boundary := self.boundary()) is not None:  # the authors' config: one per expert for text, one for images
            network = pipeline.network_config()
            text = network["in_channels"] == network["out_channels"]
            self.published_guidance = ((boundary, 4.0), (0.0, 3.0)) if text else 3.5

    def _parts_in(self, source: str) -> tuple[str, ...]:
        parts = super()._parts_in(source)
        return (*parts, SECOND) if experts_in(source) > 1 else parts

    def _ready(self, network: Any, path: str | None) -> nn.Module:
        """With attention that takes causal calls, and computes the others as the stock one does."""
        from fastvideo.distillation.adapters.diffusers.view_attention import TextAttention, ViewAttention

        for layer, block in enumerate(network.blocks):
            block.attn1.set_processor(ViewAttention(layer))
            block.attn2.set_processor(TextAttention(layer))
        return super()._ready(network, path)

    def _joined(self, networks: Sequence[nn.Module], path: str | None) -> nn.Module:
        """With the boundary that the folder's index names, if there are two experts."""
        if len(networks) == 1:
            return networks[0]
        high, low = networks
        return Experts(high, low, boundary_in(self.pipeline.resolved(path)), TIME_UNITS).eval()

    def boundary(self, path: str | None = None) -> float | None:
        return boundary_in(self.pipeline.resolved(path)) if len(self._parts(path)) > 1 else None

    def _save_network(self, folder: Path, network: nn.Module) -> None:
        if len(self.parts) == 1:
            return super()._save_network(folder, network)
        for part, expert in zip(self.parts, networks_of(network), strict=True):
            expert.save_pretrained(folder / part)

    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """As every pipeline. The index notes what stock pipelines need to know: with ``given_frames`` times per token,
        as TI2V-5B's does, so that ``WanImageToVideoPipeline`` keeps the first frame clean; the boundary of two experts,
        half-way between a student's steps."""
        super().save(folder, network, recipe, slim=slim)
        noted: dict[str, Any] = {"expand_timesteps": True} if self.config.given_frames else {}
        if (boundary := boundary_of(network)) is not None:
            noted["boundary_ratio"] = boundary_between(tuple(recipe.get("ladder", ())), boundary)
        if noted:
            file = folder / "model_index.json"
            index = json.loads(file.read_text(encoding="utf-8")) | noted
            file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def boundary_in(source: str) -> float:
    """The time between the two experts of a pipeline folder.

    Raises:
        UserError: if its index names none between 0 and 1.
    """
    ratio = read_index(source).get("boundary_ratio")
    if not isinstance(ratio, float) or not 0.0 < ratio < 1.0:
        raise UserError(
            f"model folder {source}: it has two transformers, and boundary_ratio in its model_index.json, the time "
            f"between them, is {ratio!r}; a number between 0 and 1 is expected (0.875 for Wan 2.2 T2V, 0.9 for I2V)"
        )
    return ratio
