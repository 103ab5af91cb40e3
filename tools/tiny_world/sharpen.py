"""Training of the decoder of a tiny VAE alone: sharper videos from the same latents.

Encoder and latent statistics do not change, so cached latents and trained networks remain valid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.recipe import SharpenRecipe
from tools.tiny_world.train_vae import WAN, Vae, VaeKind, ink_error, optimise, training_batches
from tools.tiny_world.vae import encode_moments

DECODER = ("decoder.", "post_quant_conv.")


def sharpen_decoder(vae: Vae, recipe: SharpenRecipe, world: TinyWorld, kind: VaeKind = WAN) -> Vae:
    """Train the decoder of ``vae`` in place on videos of ``world``; frozen, in eval mode."""
    freeze_encoder(vae)
    optimise(vae, kind.kernels(vae), recipe, "decoder", decoder_losses(vae, kind, recipe, world))
    return vae.eval().requires_grad_(False)


def freeze_encoder(vae: Vae) -> None:
    """Let gradients reach the decoder alone."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(DECODER))


def decoder_losses(vae: Vae, kind: VaeKind, recipe: SharpenRecipe, world: TinyWorld) -> Iterator[torch.Tensor]:
    """:func:`decoder_loss` of each step."""
    for step, sample in enumerate(training_batches(recipe, world)):
        yield decoder_loss(vae, kind, sample.videos, recipe, single=step < recipe.single_share * recipe.steps)


def decoder_loss(
    vae: Vae, kind: VaeKind, videos: torch.Tensor, recipe: SharpenRecipe, single: bool = False
) -> torch.Tensor:
    """Weighted reconstruction error of videos ``[B, 3, T, H, W]`` from the means of their posteriors.

    Args:
        single: decode the first latent frame alone.
    """
    with torch.no_grad():
        mean, _ = encode_moments(vae, videos)
    if single:
        mean, videos = mean[:, :, :1], videos[:, :, :1]
    return ink_error(kind.decode(vae, mean), videos, recipe.ink_weight, recipe.squared_weight)
