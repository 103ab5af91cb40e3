"""Students of LTX-2 in stock diffusers, whose pipeline takes video and sound apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.flow_config import one_guidance
from fastvideo.distillation.adapters.diffusers.packing import Patches
from fastvideo.distillation.adapters.diffusers.pipeline import library_class, load_component
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.export.flow import FlowExporter
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.parts import Parts


class LTX2Exporter(FlowExporter):
    """Guidance between two prompts alone, that of the sound in its own argument."""

    def guidance_arguments(self, guidance: GuidanceValue) -> dict[str, Any]:
        audio = 1.0 + dict(self.config)["audio_guidance_factor"] * (one_guidance(guidance) - 1.0)
        return {**super().guidance_arguments(guidance), "audio_guidance_scale": audio}

    def latent_arguments(self, latents: Tensor, parts: Parts | None) -> dict[str, Tensor]:
        """The pipeline normalises the sound's latents once more: it gets them as its autoencoder has them."""
        assert parts is not None
        video, audio = parts.split(latents)
        folder = resolve_pipeline(self.config.path, self.config.pipelines)
        vae = load_component(library_class("diffusers", "AutoencoderKLLTX2Audio"), folder, "audio_vae")
        raw = audio.cpu() * vae.latents_std + vae.latents_mean
        return {"latents": Patches(1).pack(video), "audio_latents": raw.to(audio)}
