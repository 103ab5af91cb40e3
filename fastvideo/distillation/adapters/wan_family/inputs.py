"""Options of the whole Wan family, and the inputs of a checkpoint's network that they have to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import model_validator

from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, read_index
from fastvideo.distillation.adapters.wan import WanConfig
from fastvideo.distillation.types import UserError
from fastvideo.ranges import NonNegativeInt

TEXT_BESIDE_CLIP = 512
"""Text tokens of a network that reads CLIP features: diffusers takes all before the last 512 for the image's."""
SECOND = "transformer_2"
"""Subfolder of the expert of low noise."""


class WanFamilyConfig(WanConfig):
    """Options of the Wan family."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    given_frames: NonNegativeInt = 0
    """Latent frames at the start of a video that are given and not generated: 1 goes on from an image (Wan 2.2 TI2V-5B,
    or a text-to-video model that is tuned to), more from a clip. An image-to-video checkpoint (Wan 2.1 I2V) takes its
    image otherwise and keeps 0."""

    @model_validator(mode="after")
    def _leaves_frames(self) -> WanFamilyConfig:
        frames = self.num_frames // 4 + 1
        if self.given_frames >= frames:
            raise ValueError(
                f"given_frames must leave one of {frames} latent frames to generate, got {self.given_frames}"
            )
        return self


def experts_in(source: str) -> int:
    """Networks of a pipeline folder that take turns over time: 1, or 2."""
    return 2 if (read_index(source).get(SECOND) or [None])[0] is not None else 1


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of a checkpoint's network beside noise, from its config files."""

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
            concatenated=config["in_channels"] != config["out_channels"],
            image_width=config["image_dim"],
            per_token_times=bool(read_index(source).get("expand_timesteps")),
            patch=(config["patch_size"][1], config["patch_size"][2]),
            experts=experts_in(source),
        )

    def check(self, pipeline: Pipeline[Any]) -> None:
        """Check the options of a run.

        Raises:
            UserError: if frames are given to a checkpoint that takes its image otherwise, or a size does not fit.
        """
        config: WanFamilyConfig = pipeline.config
        source, spatial = pipeline.source, pipeline.vae_config["scale_factor_spatial"]
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
