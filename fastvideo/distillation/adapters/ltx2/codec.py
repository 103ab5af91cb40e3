"""LTX-2's two autoencoders, of videos and of spectrograms, and the vocoder that makes waveforms of these."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec, component_hash, latent_space
from fastvideo.distillation.adapters.diffusers.pipeline import library_class
from fastvideo.distillation.adapters.ltx2.config import AUDIO_VAE, SPECTRUM, parts_of
from fastvideo.distillation.parts import Parts
from fastvideo.distillation.sound import Sound, SoundingCodec

WINDOW = 1024
"""Samples of a spectrogram's window, at 16 kHz; the authors' code, not a checkpoint, says so."""
FLOOR = 1e-5
"""Least magnitude in a spectrogram."""


class LTX2Codec(DiffusersCodec, SoundingCodec):
    """``AutoencoderKLLTX2Video`` and ``AutoencoderKLLTX2Audio``. A video that comes without sound has silence."""

    @cached_property
    def parts(self) -> Parts:
        return parts_of(self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.parts.shape

    @cached_property
    def audio_vae(self) -> Any:
        """The autoencoder of spectrograms."""
        return self.pipeline.frozen(library_class("diffusers", AUDIO_VAE), "audio_vae", torch_dtype=torch.float32)

    @cached_property
    def vocoder(self) -> Any:
        """Spectrograms to waveforms."""
        cls = library_class("diffusers.pipelines.ltx2", self.pipeline.index["vocoder"][1])
        return self.pipeline.frozen(cls, "vocoder", torch_dtype=torch.float32)

    @cached_property
    def latent_key(self) -> str:
        options, tensors = latent_space(self.pipeline.vae_config, self.vae)
        own, weights = latent_space(self.audio_vae.config, self.audio_vae)
        both = {**options, **{f"audio_{name}": value for name, value in own.items()}}
        return component_hash(both, {**tensors, **{f"audio_{name}": value for name, value in weights.items()}})

    @cached_property
    def known_keys(self) -> tuple[str, ...]:
        return (self.latent_key,)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = (one.view(1, -1, 1, 1, 1) for one in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor

    def _encode(self, videos: Tensor) -> Tensor:
        mean, std = self._statistics()
        latents = (self.vae.encode(videos).latent_dist.mode() - mean) / std
        return self.parts.join([latents, self._silence.to(latents).expand(len(videos), -1, -1)])

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        video = self.parts.split(latents)[0]
        time = video.new_zeros(len(video)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(video * std + mean, time, return_dict=False)[0]  # type: ignore[no-any-return]

    @property
    def sounding_rate(self) -> float:
        return float(self.pipeline.config.frame_rate)

    @torch.no_grad()
    def decode_sound(self, latents: Tensor) -> Sound:
        tokens, vae = self.parts.split(latents)[1], self.audio_vae
        raw = tokens * vae.latents_std + vae.latents_mean
        rows = raw.unflatten(2, (vae.config.latent_channels, -1)).transpose(1, 2)
        waveform = self.vocoder(vae.decode(rows, return_dict=False)[0])
        return Sound(waveform.float(), self.vocoder.config.output_sampling_rate)

    @property
    def sound_format(self) -> tuple[int, int]:
        return self.audio_vae.config.sample_rate, self.audio_vae.config.in_channels

    def with_sound(self, latents: Tensor, sound: Sound) -> Tensor:
        video, _ = self.parts.split(latents)
        return self.parts.join([video, self.encode_sound(sound.waveform).to(video)])

    @torch.no_grad()
    def encode_sound(self, waveforms: Tensor) -> Tensor:
        """Normalised latents ``[B, L, D]`` of waveforms ``[B, channels, samples]``; they are cut, or end in silence."""
        vae = self.audio_vae
        frames = SPECTRUM * (self.parts.members[1].shape[0] - 1) + 1
        spectra = [np.stack([self._spectrum(one, frames) for one in each]) for each in waveforms.cpu().double().numpy()]
        mel = torch.from_numpy(np.stack(spectra)).to(self.device, torch.float32)
        tokens = vae.encode(mel).latent_dist.mode().transpose(1, 2).flatten(2)
        return (tokens - vae.latents_mean) / vae.latents_std  # type: ignore[no-any-return]

    def _spectrum(self, waveform: Any, frames: int) -> Any:
        """Logarithm of the magnitudes ``[frames, bands]`` of one channel."""
        from transformers.audio_utils import spectrogram, window_function

        hop = self.audio_vae.config.mel_hop_length
        whole = np.zeros(max(frames * hop, WINDOW))
        whole[: len(waveform)] = waveform[: len(whole)]
        found = spectrogram(
            whole, window_function(WINDOW, "hann"), WINDOW, hop, mel_filters=self._bands, mel_floor=FLOOR, log_mel="log"
        )
        return found.T[:frames]

    @cached_property
    def _bands(self) -> Any:
        from transformers.audio_utils import mel_filter_bank

        config = self.audio_vae.config
        return mel_filter_bank(
            WINDOW // 2 + 1, config.mel_bins, 0.0, config.sample_rate / 2, config.sample_rate, "slaney", "slaney"
        )

    @cached_property
    def _silence(self) -> Tensor:
        """Latents ``[1, L, D]`` of no sound."""
        return self.encode_sound(torch.zeros(1, self.sound_format[1], WINDOW))
