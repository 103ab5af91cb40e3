"""CogVideoX text-to-video (arXiv 2408.06072) over diffusers: v-prediction on a variance-preserving schedule, T5.

Everything outside this file is rectified flow. :meth:`CogVideoXAdapter.velocity` rescales the sample so that its
signal-to-noise ratio stays, asks the network for Salimans' ``v`` at the timestep of that ratio
(:class:`~fastvideo.distillation.adapters.cogvideox_grid.NoiseGrid`), and converts the answer; no step divides by a
coefficient that can be 0. The pipeline's latents are ``[B, F, C, H, W]``; they are turned round at the network's door.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import AdapterConfig, DistillAdapter, StockSampler
from fastvideo.distillation.adapters.cogvideox_grid import NoiseGrid
from fastvideo.distillation.adapters.loading import (
    PromptCache,
    component_hash,
    full_config,
    load_component,
    load_config,
    read_recipe,
    resolve_pipeline,
    write_pipeline,
)
from fastvideo.distillation.noise import Interpolant
from fastvideo.distillation.types import Condition, RawBatch, UserError

PIPELINES = ("CogVideoXPipeline",)


class CogVideoXConfig(AdapterConfig):
    """Options of the CogVideoX family."""

    path: str
    """A diffusers CogVideoX pipeline: a folder or a hub id."""
    height: PositiveInt = 32
    """Video height in pixels."""
    width: PositiveInt = 32
    """Video width in pixels."""
    num_frames: PositiveInt = 9
    """Video frames; one more than a multiple of 8, which is how many the VAE codes at a time."""
    max_sequence_length: PositiveInt = 16
    """Tokens that a prompt may have; the network sees this many (226 for the published checkpoints)."""
    prompt_for_negative: str = ""
    """The negative prompt, used wherever guidance is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the network's forward; weights, times, losses and differences stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    prompt_cache: PositiveInt = 1024
    """Distinct prompts whose embeddings are kept, least recently used first out."""

    @model_validator(mode="after")
    def _divisible(self) -> CogVideoXConfig:
        for name, size in (("height", self.height), ("width", self.width)):
            if size % 16:
                raise ValueError(f"{name} must be a multiple of 16 (VAE factor 8, patch 2), got {size}")
        if self.num_frames % 8 != 1:
            raise ValueError(f"num_frames must be one more than a multiple of 8, got {self.num_frames}")
        return self


class CogVideoXAdapter(DistillAdapter[CogVideoXConfig]):
    """The CogVideoX family."""

    Config = CogVideoXConfig
    pipelines = PIPELINES
    published_guidance = 6.0
    summary = "CogVideoX text-to-video: v-prediction, zero-terminal-SNR schedule, T5 text"
    per_frame_times = False
    frames_first = True

    def __init__(self, config: CogVideoXConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self.source = resolve_pipeline(config.path, PIPELINES)
        self._prompts = PromptCache(self._encode_text, config.prompt_cache)

    @property
    def negative_prompt(self) -> str:
        return self.config.prompt_for_negative

    @cached_property
    def tokenizer(self) -> Any:
        """The pipeline's tokenizer."""
        from transformers import AutoTokenizer

        return load_component(AutoTokenizer, self.source, "tokenizer")

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The frozen T5 encoder, loaded on first use."""
        from transformers import T5EncoderModel

        return self._frozen(load_component(T5EncoderModel, self.source, "text_encoder", dtype=torch.float32))

    @cached_property
    def vae(self) -> Any:
        """The frozen video autoencoder, loaded on first use."""
        from diffusers import AutoencoderKLCogVideoX

        return self._frozen(load_component(AutoencoderKLCogVideoX, self.source, "vae", torch_dtype=torch.float32))

    def _frozen(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _vae_config(self) -> Mapping[str, Any]:
        from diffusers import AutoencoderKLCogVideoX

        return full_config(AutoencoderKLCogVideoX, self.source, "vae")

    @cached_property
    def _network_config(self) -> Mapping[str, Any]:
        from diffusers import CogVideoXTransformer3DModel

        return full_config(CogVideoXTransformer3DModel, self.source, "transformer")

    @cached_property
    def grid(self) -> NoiseGrid:
        """The noise levels that the network was trained on."""
        return _grid(self.source)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        spatial = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        frames = (self.config.num_frames - 1) // int(self._vae_config["temporal_compression_ratio"]) + 1
        size = self.config.height // spatial, self.config.width // spatial
        return self._vae_config["latent_channels"], frames + self._padding(frames), *size

    def _padding(self, frames: int) -> int:
        """Latent frames that CogVideoX 1.5, whose patches span two of them, puts before a video's own."""
        return -frames % (self._network_config["patch_size_t"] or 1)

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times of the timesteps that the pipeline's scheduler takes for so many steps."""
        return self.grid.times_of(self.grid.teacher_timesteps(steps))

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """``LCMScheduler`` or ``CogVideoXDDIMScheduler`` with as many steps as ``times``.

        Both walk the timesteps 999, 999 - 1000/K, ...; a ladder at the times of these is reproduced exactly.

        Raises:
            UserError: for another sampler than ``renoise`` and ``euler``, or an Euler ladder whose number of steps does
                not divide 1000.
        """
        if kind not in ("renoise", "euler"):
            raise UserError(f"sampler {kind!r} has no stock counterpart: CogVideoX has renoise and euler")
        steps = len(times)
        scheduler = self.grid.euler_scheduler(steps) if kind == "euler" else self.grid.renoising_scheduler()
        scheduler.set_timesteps(steps)
        return StockSampler(scheduler, self.grid.times_of(scheduler.timesteps.tolist()))

    def load_network(self, path: str | None = None) -> nn.Module:
        """A ``CogVideoXTransformer3DModel`` in float32, in eval mode (published ones have no dropout).

        Raises:
            UserError: if its position table is made for prompts of another length.
        """
        from diffusers import CogVideoXTransformer3DModel

        source = self.source if path is None else resolve_pipeline(path, PIPELINES)
        network = load_component(CogVideoXTransformer3DModel, source, "transformer", torch_dtype=torch.float32)
        length, wanted = self.config.max_sequence_length, network.config.max_text_seq_length
        if length != wanted and not network.config.use_rotary_positional_embeddings:
            raise UserError(f"model.max_sequence_length is {length}, the network in {source!r} takes {wanted} tokens")
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network.to(self.device).eval()  # type: ignore[no-any-return]

    @classmethod
    def network_time(cls, t: Tensor, config: CogVideoXConfig) -> Tensor:
        return _grid(resolve_pipeline(config.path, PIPELINES)).timestep(t)

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if t.ndim != 1:
            raise UserError("CogVideoX takes one time per sample: given frames and per-frame noise need another family")
        native = _variance_preserving(t)
        x = native.from_flow(x_t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            (v,) = network(
                hidden_states=x.transpose(1, 2),
                encoder_hidden_states=condition.tensors["prompt_embeds"],
                timestep=self.grid.timestep(t),
                image_rotary_emb=_rotary(network, x),
                return_dict=False,
            )
        return native.flow_velocity_from_v(x, v.float().transpose(1, 2))

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds`` ``[B, max_sequence_length, D]``, padding encoded like words, as its pipeline does."""
        self.check_prompts(self._prompts.missing(prompts))
        return Condition({"prompt_embeds": self._prompts(prompts, self.device)})

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        return {"text_embedding": (self.config.max_sequence_length, self._network_config["text_embed_dim"])}

    def encode_extras(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        return {"text_embedding": self.encode_prompts(captions).tensors["prompt_embeds"]}

    def text_of(self, raw: RawBatch) -> Condition:
        """Every position counts, padding too, so an embedding has to have all of them."""
        embedding = raw.extras.get("text_embedding")
        if embedding is None:
            return self.encode_prompts(raw.captions)
        found, wanted = tuple(embedding.shape[1:]), self.extra_shapes["text_embedding"]
        if found != wanted:
            raise UserError(f"data: text_embedding has shape {found}, the model expects {wanted} (tokens, channels)")
        return Condition({"prompt_embeds": embedding.to(self.device, torch.float32)})

    @torch.no_grad()
    def _encode_text(self, prompt: str) -> Tensor:
        length = self.config.max_sequence_length
        ids = self.tokenizer([prompt], padding="max_length", max_length=length, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device))[0][0].float()  # type: ignore[no-any-return]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            count = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > self.config.max_sequence_length:
                raise UserError(
                    f"prompt has {count} tokens, the text encoder takes {self.config.max_sequence_length} "
                    f"(model.max_sequence_length): {prompt[:80]!r}"
                )

    @cached_property
    def codec_key(self) -> str:
        """SHA-256 of the VAE's config and weights."""
        return component_hash(self._vae_config, self.vae)

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """The posterior's mean, normalised."""
        return self.normalise(self.vae.encode(videos.to(self.device)).latent_dist.mode())

    def normalise(self, latents: Tensor) -> Tensor:
        latents = latents * float(self._vae_config["scaling_factor"])
        return torch.cat([latents[:, :, :1].expand(-1, -1, self._padding(latents.shape[2]), -1, -1), latents], dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        frames = (self.config.num_frames - 1) // int(self._vae_config["temporal_compression_ratio"]) + 1
        return self.vae.decode(latents[:, :, -frames:] / self.vae.config.scaling_factor, return_dict=False)[0]  # type: ignore[no-any-return]

    @property
    def source_recipe(self) -> Mapping[str, Any]:
        return read_recipe(self.source)

    def save_pipeline(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        """A pipeline folder that ``CogVideoXPipeline.from_pretrained`` loads; all but the transformer is copied."""
        write_pipeline(self.source, folder, network, recipe)


@lru_cache(maxsize=8)
def _grid(source: str) -> NoiseGrid:
    from diffusers import CogVideoXDDIMScheduler

    return NoiseGrid(load_config(CogVideoXDDIMScheduler, source, "scheduler"))


def _variance_preserving(t: Tensor) -> Interpolant:
    """Coefficients with the signal-to-noise ratio of rectified-flow time ``t``; exact at both ends.

    By way of ``abar`` the smaller of the two would be the root of a rounded difference.
    """
    length = torch.hypot(1 - t, t)
    return Interpolant((1 - t) / length, t / length)


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
