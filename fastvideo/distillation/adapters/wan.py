"""Wan 2.1, 2.2 A14B and TI2V-5B (arXiv 2503.20314) over diffusers: ``WanTransformer3DModel``, ``AutoencoderKLWan``,
UMT5, CLIP.

The network is rectified flow natively; its time embedding counts to 1000, and that factor exists only in
:meth:`WanAdapter.network_time`. An image comes in one of two ways. Image-to-video checkpoints (Wan 2.1 I2V) read it
beside the noisy latents, on channels of their own, and see CLIP features of it; every frame is generated. Wan 2.2
TI2V-5B reads it as the first latent frame itself, clean and at time 0 (:class:`~fastvideo.distillation.types.Given`).

Wan 2.2 A14B has two networks of 14B, one for high noise and one for low: they are one
:class:`~fastvideo.distillation.experts.Experts` here, so that roles, checkpoints and averages hold it like any network.
"""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import ftfy
import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Shape, latent_frame
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.codec import StatisticsCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT, ClipImages, DiffusersConditioner, checked
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import (
    Pipeline,
    PipelineConfig,
    PipelineSpec,
    check_divisible,
    load_config,
    read_index,
)
from fastvideo.distillation.adapters.diffusers.view import Grid, View, check_causal, next_view, seeing, view_of
from fastvideo.distillation.chunks import (
    Context,
    Masked,
    Past,
    Piece,
    first_frame,
    latent_frames,
    masked_runs,
    repeated,
)
from fastvideo.distillation.config.base import Level
from fastvideo.distillation.experts import Experts, boundary_between, boundary_of
from fastvideo.distillation.noise import full_time, shift_time
from fastvideo.distillation.types import Condition, Given, RawBatch, UserError
from fastvideo.ranges import Frames, NonNegativeInt, Tokens

TIME_UNITS = 1000.0
"""The time embedding's unit: diffusers passes this as ``timestep`` at ``t = 1``."""
IMAGE_LATENTS, IMAGE_EMBEDS = "image_latents", "image_embeds"
"""Names of the image in a condition."""
FRAME, CLIP = "first_frame_latent", "clip_feature"
"""Names of the image in a dataset."""
TEXT_BESIDE_CLIP = 512
"""Text tokens of a network that reads CLIP features: diffusers takes all before the last 512 for the image's."""
SPEC = PipelineSpec(
    network="WanTransformer3DModel",
    vae="AutoencoderKLWan",
    text_encoder="UMT5EncoderModel",
    time_embedding="condition_embedder.time_embedder",
    blocks="blocks",
    published_guidance=5.0,
    second="transformer_2",
)


class WanConfig(PipelineConfig):
    """Options of the Wan family."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    level: ClassVar[Level] = "tiny distillation"
    path: str = "tiny"
    """A diffusers Wan pipeline: a folder, a hub id, or `tiny` for the one that ships with this package."""
    num_frames: Frames = 9
    """Video frames; one more than a multiple of the VAE's temporal factor."""
    given_frames: NonNegativeInt = 0
    """Latent frames at the start of a video that are given and not generated: 1 goes on from an image (Wan 2.2 TI2V-5B,
    or a text-to-video model that is tuned to), more from a clip. An image-to-video checkpoint (Wan 2.1 I2V) takes its
    image otherwise and keeps 0."""
    max_sequence_length: Tokens = 16
    """Tokens that a prompt may have; the network sees this many, zero-padded (512 for the published checkpoints)."""

    @model_validator(mode="after")
    def _divisible(self) -> WanConfig:
        check_divisible(self, side=16, frames=4)
        frames = self.num_frames // 4 + 1
        if self.given_frames >= frames:
            raise ValueError(
                f"given_frames must leave one of {frames} latent frames to generate, got {self.given_frames}"
            )
        return self


class WanAdapter(DiffusersAdapter[WanConfig]):
    """The Wan family."""

    Config = WanConfig
    summary = "Wan 2.1, 2.2 A14B and TI2V-5B, from text and images: rectified flow, UMT5 text"
    supports = DiffusersAdapter.supports | {"frame_times", "chunks"}
    _spec = SPEC

    def __init__(self, config: WanConfig, device: torch.device | str = "cpu", *, whole_forwards: bool = False) -> None:
        super().__init__(config, device, whole_forwards=whole_forwards)
        if len(self._pipeline.parts) > 1:
            self.supports = frozenset()  # a sample at several times would need both experts, tokens of either differ

    @cached_property
    def codec(self) -> WanCodec:
        return WanCodec(self._pipeline, NetworkInputs.read(self._pipeline))

    @cached_property
    def conditioner(self) -> WanConditioner:
        return WanConditioner(self._pipeline, self.codec)

    @cached_property
    def folder(self) -> WanFolder:
        return WanFolder(self._pipeline)

    @classmethod
    def network_time(cls, t: Tensor, config: WanConfig) -> Tensor:
        return t * TIME_UNITS

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
        view = None if context is None else next_view(context, x_t, Grid.of(network, x_t))
        return self._call(network, x_t, t, condition, view, r)

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        taken: list[tuple[Tensor, ...]] = []
        view = replace(next_view(past, x0, Grid.of(network, x0)), taken=taken)
        self._call(network, x0, full_time(x0, t), condition, view)
        return past.add(Piece(past.length, x0, tuple(taken)))

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
    ) -> Tensor:
        if view is not None:
            check_causal(network, SPEC.blocks)
        timestep, span = self.network_time(t, self.config), None if r is None else t - r
        if t.ndim == 2:
            timestep = _per_token(timestep, x_t, network)
            span = None if span is None else _per_token(span, x_t, network)
        own = condition.of(self.conditioner.key)
        x = torch.cat([x_t, own[IMAGE_LATENTS]], dim=1) if IMAGE_LATENTS in own else x_t
        x, text = self._input(network, x), self._input(network, own[TEXT])
        image = self._input(network, own[IMAGE_EMBEDS]) if IMAGE_EMBEDS in own else None
        with self._autocast(network, x_t), self._reading(network, span), seeing(network, view):
            (u,) = network(x, timestep, text, image, return_dict=False)
        return u.float()  # type: ignore[no-any-return]


def _per_token(times: Tensor, x_t: Tensor, network: Any) -> Tensor:
    """Per-frame times ``[B, F]`` as the per-token times that the network takes."""
    frames, height, width = network.config.patch_size
    tokens = (x_t.shape[3] // height) * (x_t.shape[4] // width)
    return times[:, ::frames].repeat_interleave(tokens, dim=1)


class WanFolder(DiffusersFolder[WanConfig]):
    """A Wan pipeline."""

    def __init__(self, pipeline: Pipeline[WanConfig]) -> None:
        super().__init__(pipeline)
        if (boundary := self.boundary()) is not None:  # the authors' config: one per expert for text, one for images
            network = pipeline.network_config()
            text = network["in_channels"] == network["out_channels"]
            self.published_guidance = ((boundary, 4.0), (0.0, 3.0)) if text else 3.5

    def _ready(self, network: Any, path: str | None) -> nn.Module:
        """With self-attention that takes causal calls, and computes the others as the stock one does."""
        from fastvideo.distillation.adapters.diffusers.view_attention import ViewAttention

        for layer, block in enumerate(network.blocks):
            block.attn1.set_processor(ViewAttention(layer))
        return super()._ready(network, path)

    def _joined(self, networks: Sequence[nn.Module], path: str | None) -> nn.Module:
        """With the boundary that the folder's index names, if there are two experts."""
        if len(networks) == 1:
            return networks[0]
        high, low = networks
        return Experts(high, low, boundary_in(self.pipeline.resolved(path)), TIME_UNITS).eval()

    def boundary(self, path: str | None = None) -> float | None:
        return boundary_in(self.pipeline.resolved(path)) if len(self._parts(path)) > 1 else None

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Uniform, then shifted once by the scheduler config's shift: the flow grid of Wan's own UniPC.

        Stock ``FlowMatchEulerDiscreteScheduler`` shifts its end point too and spends its last call where nothing is
        left to denoise (1, .858, .602, .009 for 4 steps at shift 3), which makes few steps worse.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = load_config(FlowMatchEulerDiscreteScheduler, self.pipeline.source, "scheduler")
        shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        return tuple(shift_time(1 - i / steps, shift) for i in range(steps))

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


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of a checkpoint's network beside noise, from its config files."""

    text_width: int
    """Channels of a text embedding."""
    concatenated: bool
    """The image has channels of its own beside the noisy latents."""
    image_width: int | None
    """Channels of the CLIP features that it reads; ``None`` for none."""
    per_token_times: bool
    """The checkpoint was trained with times per token (``expand_timesteps``), so that frames can be given."""
    patch: tuple[int, int]
    """Height and width of a patch, in latent pixels."""
    experts: int
    """Networks that take turns over time: 1, or 2."""

    @classmethod
    def read(cls, pipeline: Pipeline[Any]) -> NetworkInputs:
        """Inputs of the network in the pipeline's folder.

        Raises:
            UserError: if the network's config cannot be read, or wants a last frame as well as a first.
        """
        source, config = pipeline.source, pipeline.network_config()
        if config["pos_embed_seq_len"] is not None:
            raise UserError(f"model {source!r} joins a first and a last frame: this family goes on from first frames")
        return cls(
            text_width=config["text_dim"],
            concatenated=config["in_channels"] != config["out_channels"],
            image_width=config["image_dim"],
            per_token_times=bool(read_index(source).get("expand_timesteps")),
            patch=(config["patch_size"][1], config["patch_size"][2]),
            experts=len(pipeline.parts),
        )

    def check(self, pipeline: Pipeline[WanConfig]) -> None:
        """Check the options of a run.

        Raises:
            UserError: if frames are given to a checkpoint that takes its image otherwise, or a size does not fit.
        """
        source, config, spatial = pipeline.source, pipeline.config, pipeline.vae_config["scale_factor_spatial"]
        if self.concatenated and config.given_frames:
            raise UserError(
                f"model.given_frames: {source} is an image-to-video checkpoint, which reads its image beside the "
                f"noise; it takes 0, got {config.given_frames}"
            )
        if self.experts > 1 and config.given_frames:
            raise UserError(
                f"model.given_frames: {source} has two experts, which take one time per sample, and given frames have "
                f"time 0; it takes 0, got {config.given_frames}"
            )
        if self.image_width and config.max_sequence_length != TEXT_BESIDE_CLIP:
            raise UserError(
                f"model.max_sequence_length: {source} reads CLIP features before exactly {TEXT_BESIDE_CLIP} text "
                f"tokens, got {config.max_sequence_length}"
            )
        for name, size, patch in (("height", config.height, self.patch[0]), ("width", config.width, self.patch[1])):
            if size % (spatial * patch):
                raise UserError(f"model.{name}: {source} takes multiples of {spatial * patch}, got {size}")


class WanCodec(StatisticsCodec):
    """``AutoencoderKLWan``."""

    def __init__(self, pipeline: Pipeline[WanConfig], inputs: NetworkInputs) -> None:
        super().__init__(pipeline)
        self.inputs = inputs

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_config["scale_factor_temporal"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample.

        Raises:
            UserError: if the checkpoint does not take the configured size or conditioning frames.
        """
        self.inputs.check(self.pipeline)
        vae, config = self.pipeline.vae_config, self.pipeline.config
        frames, spatial = latent_frames(config.num_frames, self.temporal), vae["scale_factor_spatial"]
        return vae["z_dim"], frames, config.height // spatial, config.width // spatial

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """Diffusers' decode clamps its pixels, and a clamp stops the gradient of saturated ones."""
        return WanFrameDecoder(self).unclamped(latents) if gradient else super().decode(latents)

    def decode_frames(self, latents: Tensor, picks: Sequence[Sequence[int]]) -> Tensor:
        """One latent frame at a time: the past of a picked one is decoded without gradient, and leaves its caches."""
        decoder, rows, found = WanFrameDecoder(self), list(range(len(latents))), dict[tuple[int, int], Tensor]()
        places = [[latent_frame(frame, self.temporal) for frame in own] for own in picks]
        gradient = torch.is_grad_enabled() and latents.requires_grad
        for number in range(max(map(max, places)) + 1):
            frame = latents[rows, :, number : number + 1]
            wanted = [place for place, row in enumerate(rows) if number in places[row]]
            later = [place for place, row in enumerate(rows) if max(places[row]) > number]
            if not gradient:
                pixels = decoder.unclamped(frame)[wanted]
            elif wanted:
                pixels = decoder.rows(wanted).unclamped(frame[wanted])
            first = 1 + (number - 1) * self.temporal if number else 0
            for at, row in enumerate(rows[place] for place in wanted):
                own = [pick for pick in picks[row] if latent_frame(pick, self.temporal) == number]
                found |= {(row, pick): pixels[at, :, pick - first] for pick in own}
            decoder, rows = decoder.rows(later), [rows[place] for place in later]
            if rows and gradient:
                decoder(frame[later])
        return torch.stack([torch.stack([found[row, pick] for pick in own], 1) for row, own in enumerate(picks)])

    def frame_decoder(self) -> WanFrameDecoder:
        return WanFrameDecoder(self)


class WanFrameDecoder:
    """``AutoencoderKLWan.decode``, one latent frame at a time, that owns the caches of the causal convolutions.

    So streams do not disturb each other or a decode of whole videos, and there are no seams between chunks.
    """

    def __init__(self, codec: WanCodec) -> None:
        self.codec, self._first = codec, True
        self._mean, self._std = codec.statistics(codec.device)
        self._cache: list[Any] = [None] * _causal_convolutions(codec.vae.decoder)

    @property
    def bytes(self) -> int:
        tensors = (value for value in self._cache if isinstance(value, Tensor))
        return sum(value.numel() * value.element_size() for value in tensors)

    def fork(self) -> WanFrameDecoder:
        other = copy.copy(self)
        other._cache = list(self._cache)  # a decode replaces the tensors in it and writes to none
        return other

    def rows(self, index: Sequence[int]) -> WanFrameDecoder:
        """A decoder that goes on from the state of some samples."""
        other = self.fork()
        other._cache = [value[list(index)] if isinstance(value, Tensor) else value for value in self._cache]
        return other

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        return self.unclamped(latents).clamp(-1.0, 1.0)

    def unclamped(self, latents: Tensor) -> Tensor:
        """Frames as the network makes them, with gradient to the latents."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae, pieces = self.codec.vae, []
        for frame in vae.post_quant_conv(latents * self._std + self._mean).split(1, dim=2):
            pieces.append(vae.decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first))
            self._first = False
        video, patch = torch.cat(pieces, dim=2), vae.config.patch_size
        return video if patch is None else unpatchify(video, patch_size=patch)


def _causal_convolutions(network: nn.Module) -> int:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in network.modules())


class WanConditioner(DiffusersConditioner[WanConfig]):
    """UMT5 text, and conditioning frames beside the noise (with CLIP features) or in the latents.

    The network sees zeros beyond a prompt's own tokens, as in ``WanPipeline``.
    """

    def __init__(self, pipeline: Pipeline[WanConfig], codec: WanCodec) -> None:
        super().__init__(pipeline)
        self.codec, self.inputs, self._clip = codec, codec.inputs, ClipImages(pipeline)

    @property
    def _key_fields(self) -> set[str]:
        return super()._key_fields | ({"height", "width", "num_frames"} if self.inputs.concatenated else set())

    @property
    def text_width(self) -> int:
        return self.inputs.text_width

    def clean_prompt(self, prompt: str) -> str:
        """As ``WanPipeline`` does, without the seconds that importing it takes."""
        if prompt.isascii() and prompt.isprintable() and "&" not in prompt:  # ftfy and html have nothing to mend
            return " ".join(prompt.split())
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return re.sub(r"\s+", " ", text).strip()

    @property
    def first_frames(self) -> tuple[int, ...]:
        self.inputs.check(self.pipeline)
        if self.inputs.concatenated:
            return (1,)
        if self.config.given_frames:
            return (first_frame(self.config.given_frames, self.codec.temporal),)
        return (0, 1) if self.inputs.per_token_times else (0,)

    @property
    def _image_shapes(self) -> Mapping[str, Shape]:
        shapes: dict[str, Shape] = {FRAME: self.codec.latent_shape} if self.inputs.concatenated else {}
        return shapes | ({CLIP: (None, self.inputs.image_width)} if self.inputs.image_width else {})

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        return {**super().stored_shapes, **self._image_shapes}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        frames = latent_frames(videos.shape[2], self.codec.temporal)
        return {**super().encode_stored(videos, captions), **self._images(videos.to(self.device), frames)}

    def _images(self, videos: Tensor, frames: int) -> dict[str, Tensor]:
        """All of ``_image_shapes`` for the first frames of ``videos`` ``[B, 3, T, H, W]``."""
        found: dict[str, Tensor] = {}
        if self.inputs.concatenated:
            # Encoded as the start of a grey video: grey is 0.
            whole = _followed_by_zeros(videos[:, :, :1], first_frame(frames, self.codec.temporal))
            found[FRAME] = self.codec.encode(whole)
        if self.inputs.image_width:
            found[CLIP] = self._clip(videos[:, :, 0])
        return found

    def _encode_frames(self, frames: Tensor) -> Condition:
        whole = self.codec.latent_shape[1]
        if self.inputs.concatenated:
            return self._beside_noise(self._images(frames.to(self.device), whole))
        latents = self.codec.encode(frames)
        return _as_given(latents, latents.shape[2], whole)

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """Take them from the latents, at any size. A checkpoint that reads its image beside the noise takes them from
        ``raw.extras``, or else encodes the decoded first latent frame."""
        shapes = self._image_shapes
        if raw.latents is not None and self.inputs.concatenated:
            shapes = {**shapes, FRAME: tuple(raw.latents.shape[1:])}
        found = {name: checked(raw.extras, name, shape) for name, shape in shapes.items()}
        extras = {name: value.to(self.device) for name, value in found.items() if value is not None}
        if extras and len(extras) == len(found):
            return self._beside_noise(extras)
        if raw.latents is None:
            raise UserError("data: the model goes on from the first frames of videos, and there are prompts alone")
        latents = raw.latents.to(self.device, torch.float32)
        if self.inputs.concatenated:
            # The codec is causal, so this is the first frame.
            return self._beside_noise(self._images(self.codec.decode(latents[:, :, :1]), latents.shape[2]))
        return _as_given(latents, self.config.given_frames, latents.shape[2])

    def _beside_noise(self, extras: Mapping[str, Tensor]) -> Condition:
        """The channels beside the noisy latents: a mask, 1 on the first frame, then its latents.

        The mask has one channel per video frame of a latent frame, which is how ``WanImageToVideoPipeline`` lays it
        out.
        """
        batch, _, *size = extras[FRAME].shape
        mask = extras[FRAME].new_zeros(batch, self.codec.temporal, *size)
        mask[:, :, 0] = 1.0
        tensors = {IMAGE_LATENTS: torch.cat([mask, extras[FRAME]], dim=1)}
        return Condition({self.key: tensors | ({IMAGE_EMBEDS: extras[CLIP]} if CLIP in extras else {})})


def _followed_by_zeros(frames: Tensor, count: int) -> Tensor:
    """``count`` frames ``[B, C, count, H, W]``: ``frames``, then zeros."""
    return nn.functional.pad(frames, (0, 0, 0, 0, 0, count - frames.shape[2]))


def _as_given(latents: Tensor, count: int, frames: int) -> Condition:
    """The first ``count`` of latent frames ``[B, C, F', H, W]`` as given, in samples of ``frames`` latent frames."""
    mask = torch.zeros(latents.shape[0], frames, dtype=torch.bool, device=latents.device)
    mask[:, :count] = True
    return Condition({}, Given(mask, _followed_by_zeros(latents, frames)))
