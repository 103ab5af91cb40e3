"""One prompt in, one video out."""

from __future__ import annotations

from torch import Tensor

from fastvideo.distillation.sample import SamplerSpec
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import Sampling, sample_latents


def generate_video(
    model: LoadedModel,
    prompt: str,
    spec: SamplerSpec,
    seed: int = 0,
    negative_prompt: str | None = None,
    frames: Tensor | None = None,
) -> Tensor:
    """The video ``[3, T, H, W]`` in ``[-1, 1]`` of one prompt, float32 on the CPU.

    ``frames``: conditioning frames ``[1, 3, T', H, W]``.

    Raises:
        UserError: for a prompt that the text encoder cannot take.
    """
    with PatientBar("generating", spec.calls_of(model.adapter.codec.latent_shape[1])) as bar:
        wanted = Sampling([prompt], spec, seed, negative_prompt=negative_prompt, frames=frames)
        latents = sample_latents(model.adapter, model.denoiser, wanted, bar)
    return model.adapter.codec.decode(latents.to(model.adapter.device))[0].float().cpu().clamp(-1, 1)
