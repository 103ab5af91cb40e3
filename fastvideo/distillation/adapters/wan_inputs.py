"""What the Wan network is given beside noise: precomputed text, and an image in the way that the checkpoint takes it.

Wan has two ways. Image-to-video checkpoints (Wan 2.1 I2V) read the image beside the noisy latents, on channels of their
own, and see CLIP features of it; every frame is generated. Wan 2.2 TI2V-5B reads it as the first latent frame itself,
clean and at time 0 (:class:`~fastvideo.distillation.types.Given`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.loading import load_component, load_config
from fastvideo.distillation.types import Condition, Given, RawBatch, UserError

IMAGE_LATENTS, IMAGE_EMBEDS = "image_latents", "image_embeds"
"""Names under which the image is in a condition."""
FITTED = ("height", "width", "given_frames", "max_sequence_length")
"""Options of the family that a checkpoint may not fit."""
TEXT_BESIDE_CLIP = 512
"""Text tokens of a network that reads CLIP features: diffusers takes all before the last 512 for the image's."""


@dataclass(frozen=True)
class NetworkInputs:
    """What a checkpoint's network reads, as its config files say."""

    text_width: int
    """Channels of a text embedding."""
    concatenated: bool
    """Whether the image has channels of its own beside the noisy latents."""
    image_width: int | None
    """Channels of the CLIP features that it reads; ``None`` for none."""
    per_token_times: bool
    """Whether the checkpoint was trained with times per token (``expand_timesteps``), so that frames can be given."""
    patch: tuple[int, int]
    """Height and width of a patch, in latent pixels."""

    @classmethod
    def read(cls, source: str) -> NetworkInputs:
        """From the pipeline folder ``source``.

        Raises:
            UserError: if the transformer's config cannot be read, or wants a last frame as well as a first.
        """
        from diffusers import WanTransformer3DModel

        config = load_config(WanTransformer3DModel, source, "transformer")
        if config.get("pos_embed_seq_len") is not None:
            raise UserError(f"model {source!r} joins a first and a last frame: this family goes on from first frames")
        index = json.loads((Path(source) / "model_index.json").read_text())
        return cls(
            text_width=config["text_dim"],
            concatenated=config["in_channels"] != config["out_channels"],
            image_width=config.get("image_dim"),
            per_token_times=bool(index.get("expand_timesteps")),
            patch=(config["patch_size"][1], config["patch_size"][2]),
        )

    def check(
        self, source: str, spatial: int, *, height: int, width: int, given_frames: int, max_sequence_length: int
    ) -> None:
        """Check the options of a run; ``spatial`` are the pixels along one side of a latent pixel.

        Raises:
            UserError: if frames are given to a checkpoint that takes its image otherwise, or a size does not fit.
        """
        if self.concatenated and given_frames:
            raise UserError(
                f"model.given_frames: {source} is an image-to-video checkpoint, which reads its image beside the "
                f"noise; it takes 0, got {given_frames}"
            )
        if self.image_width and max_sequence_length != TEXT_BESIDE_CLIP:
            raise UserError(
                f"model.max_sequence_length: {source} reads CLIP features before exactly {TEXT_BESIDE_CLIP} text "
                f"tokens, got {max_sequence_length}"
            )
        for name, size, patch in (("height", height, self.patch[0]), ("width", width, self.patch[1])):
            if size % (spatial * patch):
                raise UserError(f"model.{name}: {source} takes multiples of {spatial * patch}, got {size}")


def fitted_text(embedding: Tensor, length: int, width: int) -> Tensor:
    """A precomputed text embedding ``[B, L, D]`` as ``[B, length, width]``, zero beyond its tokens.

    Raises:
        UserError: if its width is another, or it has more than ``length`` tokens that are not padding.
    """
    if embedding.shape[2] != width:
        raise UserError(f"data: text_embedding has width {embedding.shape[2]}, the model's text has width {width}")
    if embedding[:, length:].any():
        raise UserError(
            f"data: a text_embedding has {embedding.shape[1]} tokens, the model sees {length} "
            f"(model.max_sequence_length)"
        )
    kept = embedding[:, :length].float()
    return nn.functional.pad(kept, (0, 0, 0, length - kept.shape[1]))


def checked(extras: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...]) -> Tensor | None:
    """``extras[name]`` if it is there and one sample of it has ``shape``; ``None`` fits any size.

    Raises:
        UserError: with both shapes.
    """
    found = extras.get(name)
    if found is None:
        return None
    sample = tuple(found.shape[1:])
    if len(sample) != len(shape) or any(want not in (None, have) for want, have in zip(shape, sample, strict=True)):
        wanted = tuple("any" if want is None else want for want in shape)
        raise UserError(f"data: {name} has shape {sample}, the model expects {wanted}")
    return found.float()


def followed_by_grey(frames: Tensor, count: int) -> Tensor:
    """``count`` frames: those given ``[B, 3, T, H, W]``, then zeros, which are grey; what image-to-video encodes."""
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


class ClipImages:
    """The frozen CLIP image encoder of an image-to-video checkpoint, loaded on first use."""

    def __init__(self, source: str, frozen: Callable[[nn.Module], nn.Module]) -> None:
        self._source, self._frozen = source, frozen
        self._loaded: tuple[Any, nn.Module] | None = None

    def _load(self) -> tuple[Any, nn.Module]:
        from transformers import AutoImageProcessor, CLIPVisionModel

        processor = load_component(AutoImageProcessor, self._source, "image_processor")
        encoder = load_component(CLIPVisionModel, self._source, "image_encoder", dtype=torch.float32)
        return processor, self._frozen(encoder)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Hidden states ``[B, L, D]`` before the last layer, of images ``[B, 3, H, W]`` in ``[-1, 1]``."""
        self._loaded = self._loaded or self._load()
        processor, encoder = self._loaded
        bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        pixels = processor(images=list(bytes_.numpy()), return_tensors="pt", input_data_format="channels_first")
        device = next(encoder.parameters()).device
        states = encoder(pixels["pixel_values"].to(device), output_hidden_states=True).hidden_states
        return states[-2].float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ImageInput:
    """How one run gives frames to its checkpoint.

    Attributes:
        inputs: what the network reads.
        latent_shape: ``(C, F, H, W)`` of a sample.
        scale: video frames per latent frame.
        given_frames: latent frames that every sample starts from, if the network reads them as frames.
        encode, decode: the codec.
        clip: for a network that reads CLIP features.
    """

    inputs: NetworkInputs
    latent_shape: tuple[int, int, int, int]
    scale: int
    given_frames: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    clip: ClipImages | None

    @property
    def counts(self) -> tuple[int, ...]:
        """``DistillAdapter.first_frames``."""
        if self.inputs.concatenated:
            return (1,)
        if self.given_frames:
            return (1 + (self.given_frames - 1) * self.scale,)
        return (0, 1) if self.inputs.per_token_times else (0,)

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        """What of an image can be computed beforehand."""
        shapes: dict[str, tuple[int | None, ...]] = {}
        if self.inputs.concatenated:
            shapes["first_frame_latent"] = self.latent_shape
        if self.inputs.image_width:
            shapes["clip_feature"] = (None, self.inputs.image_width)
        return shapes

    def extras(self, videos: Tensor, latent_frames: int) -> dict[str, Tensor]:
        """All of :attr:`extra_shapes` for the first frames of ``videos`` ``[B, 3, T, H, W]``."""
        found: dict[str, Tensor] = {}
        if self.inputs.concatenated:
            frames = (latent_frames - 1) * self.scale + 1
            found["first_frame_latent"] = self.encode(followed_by_grey(videos[:, :, :1], frames))
        if self.clip is not None:
            found["clip_feature"] = self.clip(videos[:, :, 0])
        return found

    def condition(self, frames: Tensor) -> Condition:
        """Of given video frames ``[B, 3, T, H, W]``."""
        if self.inputs.concatenated:
            return self._beside_noise(self.extras(frames, self.latent_shape[1]))
        latents = self.encode(frames)
        return as_given(latents, latents.shape[2], self.latent_shape[1])

    def condition_of(self, raw: RawBatch, device: torch.device) -> Condition:
        """Of data: what was computed beforehand, or else what its latents (of any size) give."""
        shapes = self.extra_shapes
        if raw.latents is not None and self.inputs.concatenated:
            shapes = {**shapes, "first_frame_latent": tuple(raw.latents.shape[1:])}
        found = {name: checked(raw.extras, name, shape) for name, shape in shapes.items()}
        extras = {name: value.to(device) for name, value in found.items() if value is not None}
        if extras and len(extras) == len(found):
            return self._beside_noise(extras)
        if raw.latents is None:
            raise UserError("data: the model goes on from the first frames of videos, and there are prompts alone")
        latents = raw.latents.to(device, torch.float32)
        if self.inputs.concatenated:
            # The codec is causal, so this is the first frame.
            return self._beside_noise(self.extras(self.decode(latents[:, :, :1]), latents.shape[2]))
        return as_given(latents, self.given_frames, latents.shape[2])

    def _beside_noise(self, extras: Mapping[str, Tensor]) -> Condition:
        tensors = {IMAGE_LATENTS: beside_noise(extras["first_frame_latent"], self.scale)}
        return Condition(tensors | ({IMAGE_EMBEDS: extras["clip_feature"]} if "clip_feature" in extras else {}))


def allow_given_frames(folder: Path) -> None:
    """Note in the pipeline's index that its network was trained with times per token, as TI2V-5B's index does.

    Stock ``WanImageToVideoPipeline`` then keeps the first frame clean.
    """
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"expand_timesteps": True}
    file.write_text(json.dumps(index, indent=2) + "\n")
