"""One prompt in, one video out, with its sound."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.sound import Sound, SoundingCodec
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import Sampling, sample_latents


@dataclass(frozen=True)
class Clip:
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
    """The pictures of :func:`generate_clip` alone."""
    return generate_clip(model, prompt, spec, seed, negative_prompt, frames).video


def generate_clip(
    model: LoadedModel,
    prompt: str,
    spec: SamplerSpec,
    seed: int = 0,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
) -> Clip:
    """The video of one prompt, with its sound.

    ``frames``: conditioning frames ``[1, 3, T', H, W]``.

    Raises:
        UserError: for a prompt that the text encoder cannot take.
    """
    with PatientBar("generating", spec.calls_of(model.adapter.codec.latent_shape[1])) as bar:
        wanted = Sampling([prompt], spec, seed, negative_prompt=negative_prompt, frames=frames)
        latents = sample_latents(model.adapter, model.denoiser, wanted, bar)
    codec, latents = model.adapter.codec, latents.to(model.adapter.device)
    sound = codec.decode_sound(latents) if isinstance(codec, SoundingCodec) else None
    return Clip(codec.decode(latents)[0].float().cpu().clamp(-1, 1), sound)
