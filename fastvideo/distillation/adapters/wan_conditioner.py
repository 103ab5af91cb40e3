"""Wan's inputs beside noise: UMT5 text, and an image in the way that the checkpoint takes it.

Wan has two ways. Image-to-video checkpoints (Wan 2.1 I2V) read the image beside the noisy latents, on channels of their
own, and see CLIP features of it; every frame is generated. Wan 2.2 TI2V-5B reads it as the first latent frame itself,
clean and at time 0 (:class:`~fastvideo.distillation.types.Given`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Codec, Shape
from fastvideo.distillation.adapters.diffusers.images import ClipImages
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, PipelineConfig
from fastvideo.distillation.adapters.diffusers.texts import DiffusersConditioner, checked
from fastvideo.distillation.types import Condition, Given, RawBatch, UserError

IMAGE_LATENTS, IMAGE_EMBEDS = "image_latents", "image_embeds"
"""Names of the image in a condition."""
TEXT_BESIDE_CLIP = 512
"""Text tokens of a network that reads CLIP features: diffusers takes all before the last 512 for the image's."""


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of a checkpoint's network, from its config files."""

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

    @classmethod
    def read(cls, pipeline: Pipeline[Any]) -> NetworkInputs:
        """Inputs of the network in the pipeline's folder.

        Raises:
            UserError: if the network's config cannot be read, or wants a last frame as well as a first.
        """
        source, config = pipeline.source, pipeline.network_config()
        if config["pos_embed_seq_len"] is not None:
            raise UserError(f"model {source!r} joins a first and a last frame: this family goes on from first frames")
        index = json.loads((Path(source) / "model_index.json").read_text())
        return cls(
            text_width=config["text_dim"],
            concatenated=config["in_channels"] != config["out_channels"],
            image_width=config["image_dim"],
            per_token_times=bool(index.get("expand_timesteps")),
            patch=(config["patch_size"][1], config["patch_size"][2]),
        )

    def check(self, pipeline: Pipeline[Any], given_frames: int) -> None:
        """Check the options of a run.

        Raises:
            UserError: if frames are given to a checkpoint that takes its image otherwise, or a size does not fit.
        """
        source, config, spatial = pipeline.source, pipeline.config, pipeline.vae_config["scale_factor_spatial"]
        if self.concatenated and given_frames:
            raise UserError(
                f"model.given_frames: {source} is an image-to-video checkpoint, which reads its image beside the "
                f"noise; it takes 0, got {given_frames}"
            )
        if self.image_width and config.max_sequence_length != TEXT_BESIDE_CLIP:
            raise UserError(
                f"model.max_sequence_length: {source} reads CLIP features before exactly {TEXT_BESIDE_CLIP} text "
                f"tokens, got {config.max_sequence_length}"
            )
        for name, size, patch in (("height", config.height, self.patch[0]), ("width", config.width, self.patch[1])):
            if size % (spatial * patch):
                raise UserError(f"model.{name}: {source} takes multiples of {spatial * patch}, got {size}")


def followed_by_grey(frames: Tensor, count: int) -> Tensor:
    """``count`` frames for image-to-video to encode: ``frames`` ``[B, 3, T, H, W]``, then zeros, which are grey."""
    return nn.functional.pad(frames, (0, 0, 0, 0, 0, count - frames.shape[2]))


def beside_noise(latents: Tensor, channels: int) -> Tensor:
    """The channels beside the noisy latents: a mask of ``channels`` channels, 1 on the first frame, then ``latents``.

    The mask has one channel per video frame of a latent frame, which is how ``WanImageToVideoPipeline`` lays it out.
    """
    batch, _, frames, height, width = latents.shape
    mask = latents.new_zeros(batch, channels, frames, height, width)
    mask[:, :, 0] = 1.0
    return torch.cat([mask, latents], dim=1)


def as_given(latents: Tensor, count: int, frames: int) -> Condition:
    """The first ``count`` of latent frames ``[B, C, F', H, W]`` as given, in samples of ``frames`` latent frames."""
    clean = nn.functional.pad(latents, (0, 0, 0, 0, 0, frames - latents.shape[2]))
    mask = torch.zeros(latents.shape[0], frames, dtype=torch.bool, device=latents.device)
    mask[:, :count] = True
    return Condition({}, Given(mask, clean))


class WanConditioner(DiffusersConditioner[PipelineConfig]):
    """UMT5 text, and conditioning frames beside the noise (with CLIP features) or in the latents.

    Args:
        pipeline: the folder.
        inputs: of the network.
        codec: of the frames.
        given_frames: latent frames that every sample starts from, if the network reads them as frames.
    """

    def __init__(self, pipeline: Pipeline[Any], inputs: NetworkInputs, codec: Codec, given_frames: int) -> None:
        super().__init__(pipeline)
        self.inputs, self.codec, self.given_frames = inputs, codec, given_frames
        self._clip = ClipImages(pipeline)

    @property
    def _key_fields(self) -> set[str]:
        return super()._key_fields | ({"height", "width", "num_frames"} if self.inputs.concatenated else set())

    @property
    def text_width(self) -> int:
        return self.inputs.text_width

    def _encode_text(self, prompt: str) -> Tensor:
        """Of the prompt's own tokens: the network sees zeros beyond them, as in ``WanPipeline``."""
        tokens = self._tokens(prompt)
        with torch.no_grad():
            hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden[0, : int(tokens.attention_mask.sum())]  # type: ignore[no-any-return]

    def clean_prompt(self, prompt: str) -> str:
        """As ``WanPipeline`` does, without the seconds that importing it takes."""
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return re.sub(r"\s+", " ", text).strip()

    @property
    def _scale(self) -> int:
        """Video frames per latent frame."""
        return int(self.pipeline.vae_config["scale_factor_temporal"])

    @property
    def first_frames(self) -> tuple[int, ...]:
        self.inputs.check(self.pipeline, self.given_frames)
        if self.inputs.concatenated:
            return (1,)
        if self.given_frames:
            return (1 + (self.given_frames - 1) * self._scale,)
        return (0, 1) if self.inputs.per_token_times else (0,)

    @property
    def _image_shapes(self) -> Mapping[str, Shape]:
        shapes: dict[str, Shape] = {}
        if self.inputs.concatenated:
            shapes["first_frame_latent"] = self.codec.latent_shape
        if self.inputs.image_width:
            shapes["clip_feature"] = (None, self.inputs.image_width)
        return shapes

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        return {**super().stored_shapes, **self._image_shapes}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        latent_frames = (videos.shape[2] - 1) // self._scale + 1
        return {**super().encode_stored(videos, captions), **self._images(videos.to(self.device), latent_frames)}

    def _images(self, videos: Tensor, latent_frames: int) -> dict[str, Tensor]:
        """All of ``_image_shapes`` for the first frames of ``videos`` ``[B, 3, T, H, W]``."""
        found: dict[str, Tensor] = {}
        if self.inputs.concatenated:
            frames = (latent_frames - 1) * self._scale + 1
            found["first_frame_latent"] = self.codec.encode(followed_by_grey(videos[:, :, :1], frames))
        if self.inputs.image_width:
            found["clip_feature"] = self._clip(videos[:, :, 0])
        return found

    def _encode_frames(self, frames: Tensor) -> Condition:
        latent_frames = self.codec.latent_shape[1]
        if self.inputs.concatenated:
            return self._beside_noise(self._images(frames.to(self.device), latent_frames))
        latents = self.codec.encode(frames)
        return as_given(latents, latents.shape[2], latent_frames)

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """Of the latents, at any size. For a checkpoint that reads its image beside the noise: of ``raw.extras``
        (``first_frame_latent``, ``clip_feature``), or else encoded from the decoded first latent frame."""
        shapes = self._image_shapes
        if raw.latents is not None and self.inputs.concatenated:
            shapes = {**shapes, "first_frame_latent": tuple(raw.latents.shape[1:])}
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
        return as_given(latents, self.given_frames, latents.shape[2])

    def _beside_noise(self, extras: Mapping[str, Tensor]) -> Condition:
        tensors = {IMAGE_LATENTS: beside_noise(extras["first_frame_latent"], self._scale)}
        if "clip_feature" in extras:
            tensors[IMAGE_EMBEDS] = extras["clip_feature"]
        return Condition({self.key: tensors})
