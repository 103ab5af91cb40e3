"""One prompt in, one video out, with its sound."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.sound import Sound, SoundCodec
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import Sampling, sample_latents


@dataclass(frozen=True)
class SoundedVideo:
    """A video ``[3, T, H, W]`` in ``[-1, 1]``, float32 on the CPU, and its sound, if the model makes one."""

    video: Tensor
    sound: Sound | None = None


def generate_video(
    model: LoadedModel,
    prompt: str,
    spec: SamplerSpec,
    seed: int = 0,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
) -> Tensor:
    """The pictures of :func:`generate_sounded` alone."""
    return _pictures(
        model, _latents(model, Sampling([prompt], spec, seed, negative_prompt=negative_prompt, frames=frames))
    )


def generate_sounded(
    model: LoadedModel,
    prompt: str,
    spec: SamplerSpec,
    seed: int = 0,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
) -> SoundedVideo:
    """The video of one prompt, with its sound.

    ``frames``: conditioning frames ``[1, 3, T', H, W]``.

    Raises:
        UserError: for a prompt that the text encoder cannot take.
    """
    latents = _latents(model, Sampling([prompt], spec, seed, negative_prompt=negative_prompt, frames=frames))
    codec = model.adapter.codec
    sound = codec.decode_sound(latents) if isinstance(codec, SoundCodec) else None
    return SoundedVideo(_pictures(model, latents), sound)


def _latents(model: LoadedModel, wanted: Sampling) -> Tensor:
    """Normalised latents ``[1, C, T, H, W]`` on the model's device."""
    with PatientBar("generating", wanted.sampler.calls_of(model.adapter.codec.latent_shape[1])) as bar:
        return sample_latents(model.adapter, model.denoiser, wanted, bar).to(model.adapter.device)


def _pictures(model: LoadedModel, latents: Tensor) -> Tensor:
    return model.adapter.codec.decode(latents)[0].float().cpu().clamp(-1, 1)
