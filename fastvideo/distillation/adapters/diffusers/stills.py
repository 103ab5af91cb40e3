"""Families of images: a still is a video of one frame, and a sample is never split between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.adapter import DiffusersScaling
from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.pipeline import (
    ConfigT,
    PipelineConfig,
    check_divisible,
    library_class,
    load_config,
)
from fastvideo.distillation.adapters.diffusers.pipeline_texts import text_encoders
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Frames


class ImageConfig(PipelineConfig):
    """Options of a family of images."""

    own_sizes: ClassVar[frozenset[str]] = frozenset({"height", "width", "num_frames", "max_sequence_length"})
    side: ClassVar[int] = 8
    """Pixels of which height and width are multiples: the VAE's factor, times the side of a patch."""
    num_frames: Frames = 1
    """Frames: 1, a still."""

    @model_validator(mode="after")
    def _a_still(self) -> ImageConfig:
        if self.num_frames != 1:
            raise ValueError(f"num_frames must be 1: the family makes images, got {self.num_frames}")
        check_divisible(self, self.side, frames=4)  # one frame fits
        return self


class TextsFolder(DiffusersFolder[ConfigT]):
    """A pipeline that may have several text encoders."""

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        vae = library_class("diffusers", self.pipeline.spec.vae)
        with torch.device("meta"):
            codec = vae.from_config(load_config(vae, self.pipeline.source, "vae"))
        return {"text encoder": text_encoders(self.pipeline), "VAE": codec}


class UnsplitScaling(DiffusersScaling):
    """Tokens of a sample stay on one process."""

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        return {"attention heads": 1, "tokens": latent_shape[1] * latent_shape[2] * latent_shape[3]}


def check_whole_sample(family: str, t: Tensor) -> None:
    """Refuse times per frame.

    Raises:
        UserError: naming the family.
    """
    if t.ndim != 1:
        raise UserError(f"{family} takes one time per sample, got {t.ndim} dimensions of times")
