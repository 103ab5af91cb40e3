"""Options of the LTX-2 family, and the parts of its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.flow_config import StockCall
from fastvideo.distillation.adapters.diffusers.packing import Packing
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, full_config
from fastvideo.distillation.adapters.diffusers.videos import FlowVideoConfig
from fastvideo.distillation.parts import Part, Parts
from fastvideo.ranges import Fraction, Frames, NonNegativeFloat, Pixels, PositiveFloat, Tokens
from fastvideo.sampling_ranges import FrameRate

SIDE, STRIDE = 32, 8
"""Pixels on a side of a latent pixel, and frames of a latent frame, of all published checkpoints."""
SPECTRUM = 4
"""Frames of a spectrogram in a frame of latents of sound, and bands of it in a band of latents."""
AUDIO_VAE = "AutoencoderKLLTX2Audio"


@dataclass(frozen=True)
class Flat:
    """States as they are: the family takes their parts apart by itself."""

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed

    def tokens(self, shape: Sequence[int]) -> int:
        return shape[-1]


class LTX2Config(FlowVideoConfig):
    """Options of the LTX-2 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("LTX2Pipeline",)
    side, stride = SIDE, STRIDE
    packing: ClassVar[Packing] = Flat()
    stock: ClassVar[StockCall] = StockCall(
        packed=True,
        images=False,
        sizes=("height", "width", "num_frames", "max_sequence_length", "frame_rate"),
    )
    path: str
    """A diffusers LTX-2 pipeline: a folder, or a hub id such as `Lightricks/LTX-2`."""
    height: Pixels = 512
    """Video height in pixels."""
    width: Pixels = 768
    """Video width in pixels."""
    num_frames: Frames = 121
    """Video frames; one more than a multiple of 8."""
    frame_rate: FrameRate = 24.0
    """Frames per second: the network reads them as distances in time, and the sound is as long as the video."""
    max_sequence_length: Tokens = 1024
    """Tokens that a prompt may have, and to which it is padded; a multiple of the connectors' registers."""
    audio_weight: PositiveFloat = 1.0
    """Weight of the sound in losses, whatever its size; that of the video is 1."""
    audio_guidance_factor: NonNegativeFloat = 3.0
    """Guidance of the sound, by its distance from 1 over that of the video's: the authors' 7 for a video's 3."""
    guidance_rescale: Fraction = 0.7
    """Share of a guided estimate's deviation, in each part, that is taken from the conditional one: 0 leaves it."""

    @property
    def call_arguments(self) -> Mapping[str, Any]:
        """Guidance by skipped blocks and by parts alone, turned off."""
        own = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": self.guidance_rescale}
        both = {name: value for key, value in own.items() for name, value in ((key, value), (f"audio_{key}", value))}
        return {**both, "spatio_temporal_guidance_blocks": None}


def parts_of(pipeline: Pipeline[LTX2Config]) -> Parts:
    """``video`` ``(C, F, h, w)`` and ``audio`` ``(L, C M)``, one row per frame of its latents."""
    config, audio = pipeline.config, full_config(AUDIO_VAE, pipeline.source, "audio_vae")
    frames = (config.num_frames - 1) // STRIDE + 1
    video = (pipeline.vae_config["latent_channels"], frames, config.height // SIDE, config.width // SIDE)
    per_second = audio["sample_rate"] / audio["mel_hop_length"] / float(SPECTRUM)
    length = round(config.num_frames / config.frame_rate * per_second)
    width = audio["latent_channels"] * (audio["mel_bins"] // SPECTRUM)
    return Parts((Part("video", video), Part("audio", (length, width), config.audio_weight)))
