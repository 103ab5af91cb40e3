"""CogVideoX text-to-video (arXiv 2408.06072) over diffusers: v-prediction on a variance-preserving schedule, T5.

Everything outside this file is rectified flow. :meth:`CogVideoXAdapter.velocity` rescales the sample so that its
signal-to-noise ratio stays, asks the network for Salimans' ``v`` at the timestep of that ratio
(``diffusers.discrete_vp.NoiseGrid``), and converts the answer; no step divides by a coefficient that can be 0. The
pipeline's latents are ``[B, F, C, H, W]``; they are turned round at the network's door.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.abilities import Shape
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter, DiffusersScaling
from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, noise_grid
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineConfig, PipelineSpec, check_divisible
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.diffusers.stored_texts import STORED, DiffusersConditioner
from fastvideo.distillation.adapters.diffusers.teacher_forced import teacher_forced
from fastvideo.distillation.adapters.diffusers.view import Table, View, axis_table, check_causal, next_view, paired
from fastvideo.distillation.chunks import Context, Masked, Past, Piece, Span
from fastvideo.distillation.config.sections import Level
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import Frames, Tokens

NORMS = frozenset({"conv_y", "conv_b"})
"""Caches of ``CogVideoXSpatialNorm3D``, by their names in its decoder."""
SCHEDULER = "CogVideoXDDIMScheduler"
"""Class that reads the checkpoint's noise levels, with their shift."""
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
    level: ClassVar[Level] = "tiny distillation"
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
        return latent_frames(int(self.pipeline.config.num_frames), self.temporal)

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

    def denormalise(self, latents: Tensor) -> Tensor:
        """The VAE's raw latents."""
        return latents / float(self.vae.config.scaling_factor)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._decoded(self.denormalise(latents[:, :, -self._video_frames :]))

    def frame_decoder(self) -> CogVideoXFrameDecoder:
        return CogVideoXFrameDecoder(self, self._padding(self._video_frames))


class CogVideoXFrameDecoder:
    """``AutoencoderKLCogVideoX.decode`` of a stream, that owns the caches of the causal convolutions.

    The VAE decodes latent frames in groups, three and then two at a time, which its norms see together. So frames wait
    here until their group is there, and a call may give none; chunks of an even number of frames never wait.
    """

    def __init__(self, codec: CogVideoXCodec, padding: int) -> None:
        self.codec, self._padding = codec, padding
        self._waiting: Tensor | None = None
        self._cache: dict[str, Any] | None = None

    @property
    def bytes(self) -> int:
        waiting = [] if self._waiting is None else [self._waiting]
        return sum(value.numel() * value.element_size() for value in (*_tensors(self._cache or {}), *waiting))

    def fork(self) -> CogVideoXFrameDecoder:
        return copy.copy(self)  # a decode makes new caches and writes to none

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        padding = min(self._padding, latents.shape[2])
        self._padding -= padding
        waiting = self.codec.denormalise(latents[:, :, padding:])
        if self._waiting is not None:
            waiting = torch.cat([self._waiting, waiting], dim=2)
        config = self.codec.vae.config
        size = [side * 2 ** (len(config.block_out_channels) - 1) for side in latents.shape[3:]]
        pieces = [latents.new_empty(len(latents), config.out_channels, 0, *size)]
        while waiting.shape[2] >= (group := 3 if self._cache is None else 2):
            pieces.append(self._decode(waiting[:, :, :group]))
            waiting = waiting[:, :, group:]
        self._waiting = waiting.clone()
        return torch.cat(pieces, dim=2)

    def _decode(self, group: Tensor) -> Tensor:
        vae = self.codec.vae
        raw = group if vae.post_quant_conv is None else vae.post_quant_conv(group)
        frames, cache = vae.decoder(raw, conv_cache=self._cache)
        self._cache = _read_again(cache)
        return frames  # type: ignore[no-any-return]


def _read_again(cache: Mapping[str, Any]) -> dict[str, Any]:
    """Nested caches without those of the norms, whose convolutions see one frame and keep a whole group for nothing."""
    return {
        name: _read_again(value) if isinstance(value, Mapping) else value
        for name, value in cache.items()
        if name not in NORMS
    }


def _tensors(cache: Mapping[str, Any]) -> Iterator[Tensor]:
    """Tensors of the nested caches of a decoder; a layer without a past has ``None``."""
    for value in cache.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif value is not None:
            yield value


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
        """The noise levels that the network was trained on.

        Raises:
            UserError: for a scheduler that is not v-prediction on a table that ends in pure noise.
        """
        grid = noise_grid(self.pipeline.source, SCHEDULER)
        if grid.prediction != "v_prediction" or grid.noisiest != 1.0:
            raise UserError(
                "the scheduler of a CogVideoX model has prediction_type v_prediction and rescale_betas_zero_snr true, "
                f"that of {self.pipeline.source} {grid.prediction} and noise up to t = {grid.noisiest:.4f}"
            )
        return grid

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

    def _ready(self, network: Any, path: str | None) -> nn.Module:
        """With attention that takes causal calls, and computes the others as the stock one does."""
        from fastvideo.distillation.adapters.diffusers.joint_attention import JointViewAttention

        for layer, block in enumerate(network.transformer_blocks):
            block.attn1.set_processor(JointViewAttention(layer))
        return super()._ready(network, path)

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times of the timesteps that the pipeline's scheduler takes for so many steps."""
        return self.grid.times_of(self.grid.teacher_timesteps(steps))


class CogVideoXAdapter(DiffusersAdapter[CogVideoXConfig]):
    """The CogVideoX family."""

    Config = CogVideoXConfig
    summary = "CogVideoX text-to-video: v-prediction, zero-terminal-SNR schedule, T5 text"
    supports = DiffusersAdapter.supports | {"chunks", "frames"}
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
        return noise_grid(resolve_pipeline(config.path, config.pipelines), SCHEDULER).timestep(t)

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
            return teacher_forced(self, network, x_t, t, condition, context)
        if context is None:
            return self._call(network, x_t, t, condition, _rotary(network, x_t), r)
        positions = next_view(network, context, x_t, RotaryGrid.of(network, x_t))
        return self._call(network, x_t, t, condition, positions, r)

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        taken: list[tuple[Tensor, ...]] = []
        view = replace(next_view(network, past, x0, RotaryGrid.of(network, x0)), taken=taken)
        self._call(network, x0, full_time(x0, t), condition, view)
        return past.add(Piece(past.length, x0, tuple(taken)))

    def _call(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        positions: Halves | View | None,
        r: Tensor | None = None,
    ) -> Tensor:
        if t.ndim != 1:
            raise UserError("CogVideoX takes one time per sample: given frames and per-frame noise need another family")
        if isinstance(positions, View):
            check_causal(network, SPEC.blocks)
        grid = self.folder.grid
        x = self._input(network, grid.network_input(x_t, t))
        with self._autocast(network, x_t), self._reading(network, None if r is None else t - r):
            (v,) = network(
                hidden_states=x.transpose(1, 2),
                encoder_hidden_states=self._input(network, condition.of(self.conditioner.key)[TEXT]),
                timestep=grid.timestep(t),
                image_rotary_emb=positions,
                return_dict=False,
            )
        return grid.flow_velocity(x_t, x, t, v.float().transpose(1, 2))


Halves = tuple[Tensor, Tensor]
"""Cosines and sines ``[tokens, D]``, as CogVideoX takes them."""


@dataclass(frozen=True)
class RotaryGrid:
    """Tokens of a patch's frames, and their rotary embedding, of which time is the first quarter of the channels."""

    frame: Tensor
    """Cosines and sines ``[tokens, D / 2, 2]`` of the first frame."""
    step: int
    """Latent frames of a patch: 2 in CogVideoX 1.5."""

    @classmethod
    def of(cls, network: Any, x: Tensor) -> RotaryGrid:
        """Grid of a chunk ``[B, C, c, H, W]``.

        Raises:
            UserError: for a network without rotary embedding, or a chunk that cuts patches.
        """
        step, frame = network.config.patch_size_t or 1, _rotary(network, x, 1)
        if frame is None:
            raise UserError(
                "CogVideoX-2b adds the positions of a whole video to its tokens, so it cannot continue one chunk by "
                "chunk: take a checkpoint with rotary positions, CogVideoX-5b or 1.5"
            )
        if x.shape[2] % step:
            raise UserError(f"reach.chunk: patches of CogVideoX 1.5 span {step} latent frames, got {x.shape[2]}")
        return cls(paired(*frame), step)

    def span(self, frames: Span) -> Span:
        """Frames in tokens."""
        tokens = len(self.frame)
        return frames[0] // self.step * tokens, frames[1] // self.step * tokens

    def table(self, positions: tuple[int, ...], device: torch.device) -> Table:
        """Rotation of every token of frames at these positions, without an end."""
        at = tuple(position // self.step for position in positions[:: self.step])
        time = axis_table(self.frame.shape[1] // 2, at).to(device)
        shape, width = (len(time), len(self.frame), -1, 2), time.shape[1]
        both = torch.cat([time[:, None].expand(shape), self.frame[None, :, width:].expand(shape)], dim=2)
        return both.flatten(0, 1)[None, :, None]


def _rotary(network: nn.Module, x: Tensor, frames: int | None = None) -> Halves | None:
    """Rotary embedding of latents ``[B, C, F, H, W]``, or of ``frames`` patches of that size; ``None`` without one."""
    config: Any = network.config
    if not config.use_rotary_positional_embeddings:
        return None
    patch, span = config.patch_size, config.patch_size_t
    base = config.sample_height // patch, config.sample_width // patch
    grid = frames or x.shape[2] // (span or 1), x.shape[3] // patch, x.shape[4] // patch
    return _rotary_table(config.attention_head_dim, base, grid, span is not None, x.device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _rotary_table(
    width: int, base: tuple[int, int], grid: tuple[int, int, int], sliced: bool, device: torch.device
) -> Halves:
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
        from fastvideo.distillation.adapters.diffusers.joint_attention import JointAttention

        network.set_attn_processor(JointAttention())
        super().split_tokens(network, mesh)
