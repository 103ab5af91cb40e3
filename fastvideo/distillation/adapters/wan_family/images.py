"""Images and clips that a Wan network goes on from, in one of two ways.

Image-to-video checkpoints (Wan 2.1 I2V) read an image beside the noisy latents, on channels of their own, and see CLIP
features of it; every frame is generated. Wan 2.2 TI2V-5B reads it as the first latent frame itself, clean and at time 0
(:class:`~fastvideo.distillation.types.Given`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.abilities import FirstFrames, Shape
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline
from fastvideo.distillation.adapters.diffusers.stored_texts import ClipImages, DiffusersConditioner, checked
from fastvideo.distillation.adapters.wan import WanConditioner, WanConfig
from fastvideo.distillation.adapters.wan_family.frames import WanFrameCodec
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.distillation.types import Condition, Given, RawBatch, UserError

IMAGE_LATENTS, IMAGE_EMBEDS = "image_latents", "image_embeds"
"""Names of the image in a condition."""
FRAME, CLIP = "first_frame_latent", "clip_feature"
"""Names of the image in a dataset."""


class WanImageConditioner(DiffusersConditioner[WanConfig], WanConditioner, FirstFrames):
    """Text, and conditioning frames beside the noise (with CLIP features) or in the latents."""

    config: WanFamilyConfig

    def __init__(self, pipeline: Pipeline[Any], codec: WanFrameCodec) -> None:
        super().__init__(pipeline)
        self.codec, self.inputs, self._clip = codec, codec.inputs, ClipImages(pipeline)

    @property
    def text_width(self) -> int:
        return int(self.pipeline.network_config()["text_dim"])

    @property
    def _key_fields(self) -> set[str]:
        return super()._key_fields | ({"height", "width", "num_frames"} if self.inputs.concatenated else set())

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
