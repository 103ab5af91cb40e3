"""Training of the decoder of a tiny VAE alone: sharper videos from the same latents.

Encoder and latent statistics do not change, so cached latents and trained networks remain valid.
"""

from __future__ import annotations

import torch

from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.recipe import SharpenRecipe
from tools.tiny_world.train_vae import WAN, Vae, VaeKind, ink_error, optimise
from tools.tiny_world.vae import encode_moments

DECODER = ("decoder.", "post_quant_conv.")


def sharpen_decoder(vae: Vae, recipe: SharpenRecipe, world: TinyWorld, kind: VaeKind = WAN) -> Vae:
    """Train the decoder of ``vae`` in place on videos of ``world``; frozen, in eval mode."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(DECODER))

    def loss(step: int, videos: torch.Tensor) -> torch.Tensor:
        return decoder_loss(vae, kind, videos, recipe, single=step < recipe.single_share * recipe.steps)

    optimise(vae, kind.kernels(vae), recipe, "decoder", loss, world)
    return vae.eval().requires_grad_(False)


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
