"""Training of the decoder of a tiny VAE alone: sharper videos from the same latents.

The encoder and the latent statistics stay as they are, so latents that were computed and networks that were trained on
them remain valid.
"""

from __future__ import annotations

import torch
from torch import nn

from fastvideo.inference.progress import tracked
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.recipe import SharpenRecipe
from tools.tiny_world.train_vae import WAN, Vae, VaeKind, ink_error, split_optimizers, warmed_cosine
from tools.tiny_world.vae import encode_moments

DECODER = ("decoder.", "post_quant_conv.")


def sharpen_decoder(vae: Vae, recipe: SharpenRecipe, kind: VaeKind = WAN) -> Vae:
    """Train the decoder of ``vae`` in place on videos of the train split; frozen, in eval mode."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(DECODER))
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizers = split_optimizers(parameters, kind.kernels(vae), recipe.muon_rate, recipe.adam_rate)
    share = warmed_cosine(recipe.warm_up, recipe.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    samples = TinyWorld("train").batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)
    for step, sample in enumerate(tracked(samples, "decoder", total=recipe.steps)):
        vae.zero_grad()
        single = step < recipe.single_share * recipe.steps
        decoder_loss(vae, kind, sample.videos, recipe, single).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return vae.eval().requires_grad_(False)


def decoder_loss(
    vae: Vae, kind: VaeKind, videos: torch.Tensor, recipe: SharpenRecipe, single: bool = False
) -> torch.Tensor:
    """Weighted reconstruction error of videos ``[B, 3, T, H, W]`` from the means of their posteriors.

    Args:
        single: decode the first latent alone, which is the first frame.
    """
    with torch.no_grad():
        mean, _ = encode_moments(vae, videos)
    if single:
        mean, videos = mean[:, :, :1], videos[:, :, :1]
    return ink_error(kind.decode(vae, mean), videos, recipe.ink_weight, recipe.squared_weight)
