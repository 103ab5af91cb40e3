"""``Pipeline``: a diffusers pipeline folder as one family reads it, shared by the family's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from fastvideo.distillation.adapters.diffusers.loading import (
    full_config,
    library_class,
    load_component,
    resolve_pipeline,
)
from fastvideo.distillation.config.base import AdapterConfig


class PipelineConfig(AdapterConfig):
    """Options of every family over a diffusers pipeline."""

    height: PositiveInt = 32
    """Video height in pixels."""
    width: PositiveInt = 32
    """Video width in pixels."""
    num_frames: PositiveInt = 9
    """Video frames."""
    max_sequence_length: PositiveInt = 16
    """Tokens that a prompt may have."""
    prompt_for_negative: str = ""
    """The negative prompt, used wherever guidance is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the network's forward; weights, times, losses and differences stay float32."""
    attention_backend: str = "native"
    """Attention kernel, by its name in diffusers' dispatcher: `native` is torch's own, `flash` or `sage` need a
    package. It is printed at the start and never replaced by another."""
    compile_blocks: bool = False
    """Compile the network's repeated blocks (torch.compile): the first steps take a minute, the others less time."""
    prompt_cache_mib: NonNegativeInt = 512
    """MiB of host memory for embeddings of prompts, least recently used first out."""


def check_divisible(config: PipelineConfig, side: int, frames: int) -> None:
    """Check that sides are multiples of ``side`` and frames one more than a multiple of ``frames``.

    Raises:
        ValueError: for the first that is not, as pydantic's validators want it.
    """
    for name, size in (("height", config.height), ("width", config.width)):
        if size % side:
            raise ValueError(f"{name} must be a multiple of {side} (VAE factor {side // 2}, patch 2), got {size}")
    if config.num_frames % frames != 1:
        raise ValueError(f"num_frames must be one more than a multiple of {frames}, got {config.num_frames}")


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


@dataclass(frozen=True)
class PipelineSpec:
    """Class names and module names of one family's pipelines."""

    network: str
    """Class of the denoising network, in diffusers."""
    vae: str
    """Class of the autoencoder, in diffusers."""
    text_encoder: str
    """Class of the text encoder, in transformers."""
    time_embedding: str
    """Module of the network whose output is the time embedding: a flow map's second time goes in here."""
    blocks: str
    """Attribute of the network that lists its repeated blocks."""
    published_guidance: float
    """Guidance that the family's authors sample with."""
    parts: tuple[str, ...] = ("transformer",)
    """Subfolders that hold the network."""


class Pipeline(Generic[ConfigT]):
    """One pipeline folder with the options of a run.

    Raises:
        UserError: if ``config.path`` is no pipeline of the family.
    """

    def __init__(self, spec: PipelineSpec, config: ConfigT, device: torch.device) -> None:
        self.spec, self.config, self.device = spec, config, device
        self.source = resolve_pipeline(config.path, config.pipelines)

    def resolved(self, path: str | None) -> str:
        """The pipeline folder behind ``path``; ``None`` is the run's own."""
        return self.source if path is None else resolve_pipeline(path, self.config.pipelines)

    def network_config(self, path: str | None = None) -> Mapping[str, Any]:
        """The network's config, with diffusers' defaults for what its file lacks."""
        return self._own_network_config if path is None else self._network_config(self.resolved(path))

    @cached_property
    def _own_network_config(self) -> Mapping[str, Any]:
        return self._network_config(self.source)

    def _network_config(self, source: str) -> Mapping[str, Any]:
        return full_config(library_class("diffusers", self.spec.network), source, self.spec.parts[0])

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        """The autoencoder's config, with diffusers' defaults for what its file lacks."""
        return full_config(library_class("diffusers", self.spec.vae), self.source, "vae")

    def frozen(self, cls: type[Any], subfolder: str, **options: Any) -> Any:
        """A component that is never trained, on the device."""
        module: nn.Module = load_component(cls, self.source, subfolder, **options)
        return module.to(self.device).eval().requires_grad_(False)
