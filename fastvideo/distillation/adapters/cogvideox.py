"""CogVideoX text-to-video (arXiv 2408.06072) over diffusers: v-prediction on a variance-preserving schedule, T5.

Everything outside this file is rectified flow. :meth:`CogVideoXAdapter.velocity` rescales the sample so that its
signal-to-noise ratio stays, asks the network for Salimans' ``v`` at the timestep of that ratio
(``diffusers.discrete_vp.NoiseGrid``), and converts the answer; no step divides by a coefficient that can be 0. The
pipeline's latents are ``[B, F, C, H, W]``; they are turned round at the network's door.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Shape, refused_context
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter, DiffusersScaling
from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.adapters.diffusers.conditioner import STORED, TEXT, DiffusersConditioner
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, noise_grid, variance_preserving
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import (
    PipelineConfig,
    PipelineSpec,
    check_divisible,
    resolve_pipeline,
)
from fastvideo.distillation.chunks import Context
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import Frames, Tokens

SPEC = PipelineSpec(
    network="CogVideoXTransformer3DModel",
    vae="AutoencoderKLCogVideoX",
    text_encoder="T5EncoderModel",
    time_embedding="time_embedding",
    blocks="transformer_blocks",
    published_guidance=6.0,
)


class CogVideoXConfig(PipelineConfig):
    """Options of the CogVideoX family."""

    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    path: str
    """A diffusers CogVideoX pipeline: a folder, a hub id, or `tiny_cogvideox` for the one that ships here."""
    num_frames: Frames = 9
    """Video frames; one more than a multiple of 8, which is how many the VAE codes at a time."""
    max_sequence_length: Tokens = 16
    """Tokens that a prompt may have; the network sees this many (226 for the published checkpoints)."""

    @model_validator(mode="after")
    def _divisible(self) -> CogVideoXConfig:
        check_divisible(self, side=16, frames=8)
        return self


class CogVideoXCodec(DiffusersCodec):
    """``AutoencoderKLCogVideoX``: one scaling factor."""

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_config["temporal_compression_ratio"])

    @property
    def _video_frames(self) -> int:
        """Latent frames of a video, without padding."""
        return (int(self.pipeline.config.num_frames) - 1) // self.temporal + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        vae, config, frames = self.pipeline.vae_config, self.pipeline.config, self._video_frames
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        size = config.height // spatial, config.width // spatial
        return vae["latent_channels"], frames + self._padding(frames), *size

    def _padding(self, frames: int) -> int:
        """Latent frames that CogVideoX 1.5, whose patches span two of them, puts before a video's own."""
        return -frames % (self.pipeline.network_config()["patch_size_t"] or 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Times the VAE's scaling factor, with the first frame repeated in front where patches need it."""
        latents = latents * float(self.pipeline.vae_config["scaling_factor"])
        return torch.cat([latents[:, :, :1].expand(-1, -1, self._padding(latents.shape[2]), -1, -1), latents], dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._decoded(latents[:, :, -self._video_frames :] / self.vae.config.scaling_factor)


class CogVideoXConditioner(DiffusersConditioner[CogVideoXConfig]):
    """T5 text; padding is encoded like words, without a mask, as in ``CogVideoXPipeline``."""

    encodes_padding = True

    @property
    def text_width(self) -> int:
        return int(self.pipeline.network_config()["text_embed_dim"])

    @property
    def stored_shapes(self) -> dict[str, Shape]:
        return {STORED: (self.config.max_sequence_length, self.text_width)}

    def _fitted(self, embedding: Tensor) -> Tensor:
        """Every position counts, padding too, so an embedding has to have all of them."""
        found, wanted = tuple(embedding.shape[1:]), self.stored_shapes[STORED]
        if found != wanted:
            raise UserError(f"data: text_embedding has shape {found}, the model expects {wanted} (tokens, channels)")
        return embedding.to(self.device, non_blocking=True).float()


class CogVideoXFolder(DiffusersFolder[CogVideoXConfig]):
    """A CogVideoX pipeline."""

    @property
    def grid(self) -> NoiseGrid:
        """The noise levels that the network was trained on."""
        return noise_grid(self.pipeline.source)

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A ``CogVideoXTransformer3DModel`` in eval mode (published ones have no dropout).

        Raises:
            UserError: if its position table is made for prompts of another length.
        """
        network: Any = super().load_network(path, dtype)
        length, wanted = self.config.max_sequence_length, network.config.max_text_seq_length
        if length != wanted and not network.config.use_rotary_positional_embeddings:
            source = path or self.pipeline.source
            raise UserError(f"model.max_sequence_length is {length}, the network in {source!r} takes {wanted} tokens")
        return network  # type: ignore[no-any-return]

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times of the timesteps that the pipeline's scheduler takes for so many steps."""
        return self.grid.times_of(self.grid.teacher_timesteps(steps))


class CogVideoXAdapter(DiffusersAdapter[CogVideoXConfig]):
    """The CogVideoX family."""

    Config = CogVideoXConfig
    summary = "CogVideoX text-to-video: v-prediction, zero-terminal-SNR schedule, T5 text"
    _spec = SPEC

    @cached_property
    def codec(self) -> CogVideoXCodec:
        return CogVideoXCodec(self._pipeline)

    @cached_property
    def conditioner(self) -> CogVideoXConditioner:
        return CogVideoXConditioner(self._pipeline)

    @cached_property
    def folder(self) -> CogVideoXFolder:
        return CogVideoXFolder(self._pipeline)

    @cached_property
    def scaling(self) -> CogVideoXScaling:
        return CogVideoXScaling(self._pipeline)

    @classmethod
    def network_time(cls, t: Tensor, config: CogVideoXConfig) -> Tensor:
        return noise_grid(resolve_pipeline(config.path, config.pipelines)).timestep(t)

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
        if context is not None:
            raise refused_context(type(self).__name__)
        if t.ndim != 1:
            raise UserError("CogVideoX takes one time per sample: given frames and per-frame noise need another family")
        native = variance_preserving(t)
        x = self._input(network, native.from_flow(x_t))
        with self._autocast(network, x_t), self._reading(network, None if r is None else t - r):
            (v,) = network(
                hidden_states=x.transpose(1, 2),
                encoder_hidden_states=self._input(network, condition.of(self.conditioner.key)[TEXT]),
                timestep=self.folder.grid.timestep(t),
                image_rotary_emb=_rotary(network, x),
                return_dict=False,
            )
        return native.flow_velocity_from_v(x, v.float().transpose(1, 2))


def _rotary(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of the rotary embedding for latents ``[B, C, F, H, W]``; ``None`` where the network has none."""
    config: Any = network.config
    if not config.use_rotary_positional_embeddings:
        return None
    patch, span = config.patch_size, config.patch_size_t
    base = config.sample_height // patch, config.sample_width // patch
    grid = x.shape[2] // (span or 1), x.shape[3] // patch, x.shape[4] // patch
    return _rotary_table(config.attention_head_dim, base, grid, span is not None, x.device)


@lru_cache(maxsize=8)
def _rotary_table(
    width: int, base: tuple[int, int], grid: tuple[int, int, int], sliced: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The table of ``CogVideoXPipeline``: 1.0 stretches the trained size over ``grid``, 1.5 cuts from it (sliced)."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, *size = grid
    crop = None if sliced else get_resize_crop_region_for_grid(tuple(size), base[1], base[0])
    cut = {"grid_type": "slice", "max_size": base} if sliced else {}
    return get_3d_rotary_pos_embed(width, crop, tuple(size), frames, device=device, **cut)  # type: ignore[no-any-return]


class CogVideoXScaling(DiffusersScaling):
    """Both text and video tokens are split, as they attend to each other together; diffusers has no plan for it.

    Attention does not depend on the order of keys, so the parts may be joined process by process.
    """

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        config, (frames, height, width) = self.pipeline.network_config(path), latent_shape[1:]
        span, patch, length = (
            config["patch_size_t"] or 1,
            config["patch_size"],
            self.pipeline.config.max_sequence_length,
        )
        tokens = (frames // span) * (height // patch) * (width // patch)
        return {"attention heads": config["num_attention_heads"], "tokens": tokens, "text tokens": length}

    def plan(self) -> dict[str, Any]:
        """Split before the first block, gather after the last layer; the rotary table is split like the video."""
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        table, tokens = ContextParallelInput(split_dim=0, expected_dims=2), ContextParallelInput(1, expected_dims=3)
        return {
            "": {"image_rotary_emb": [table, table]},
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def split_tokens(self, network: Any, mesh: Any) -> None:
        network.set_attn_processor(JointAttention())
        super().split_tokens(network, mesh)


class JointAttention:
    """``CogVideoXAttnProcessor2_0`` through diffusers' dispatcher, which knows how to exchange heads for tokens."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens ``[B, V, D]`` and text tokens ``[B, L, D]``, this process's part of each, in and out."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        joint, length = torch.cat([encoder_hidden_states, hidden_states], dim=1), encoder_hidden_states.shape[1]
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_rotated(x, length, image_rotary_emb) for x in (query, key))
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        return out[:, length:], out[:, :length]


def _rotated(x: Tensor, text_length: int, table: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, S, heads, width]`` with positions on the video tokens."""
    from diffusers.models.embeddings import apply_rotary_emb

    text, video = x[:, :text_length], x[:, text_length:]
    return torch.cat([text, apply_rotary_emb(video, table, sequence_dim=1).to(x.dtype)], dim=1)
