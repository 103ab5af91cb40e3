"""The VAE of the streaming world: the shipped one, trained on until it holds for videos of any length.

Causal convolutions that only saw nine frames never saw full caches: the shipped VAE is at 20.7 dB on 129 frames, where
it is at 36.1 dB on nine. Videos of :func:`fastvideo.tiny.world.torus` teach it, up to the length that they have: see
docs/log.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import torus
from tools.tiny_world.pipeline import save_half
from tools.tiny_world.recipe import SharpenRecipe, VaeRecipe
from tools.tiny_world.sharpen import sharpen_decoder
from tools.tiny_world.train_vae import WAN, fit_vae
from tools.tiny_world.vae import encode_moments, psnr

BLOCK = 16  # frames between two readings of the reconstruction's quality


@dataclass(frozen=True)
class StreamRecipe:
    """Training of the streaming VAE.

    Attributes:
        vae: encoder and decoder together, from the shipped weights; half of its steps see 17 frames.
        sharpen: the decoder alone, with fixed latents.
        report_videos, report_frames: held-out videos behind the printed figures, and their length.
    """

    vae: VaeRecipe = field(
        default_factory=lambda: VaeRecipe(
            steps=2400, batch_size=8, muon_rate=3e-3, adam_rate=1.5e-3, short_frames=17, short_share=0.5, seed=21
        )
    )
    sharpen: SharpenRecipe = field(default_factory=lambda: SharpenRecipe(steps=1800, batch_size=6, seed=22))
    report_videos: int = 64
    report_frames: int = 129


def vae_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Train the shipped VAE on long videos and save it; returns its quality."""
    vae = fit_vae(WAN.load(PIPELINE_FOLDER / "vae"), recipe.vae, torus("train"))
    save_half(vae, out / "pipeline" / "vae")
    return reconstruction(vae, recipe)


def decoder_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Train the decoder of the VAE in ``out`` and save it; returns the quality of the VAE then."""
    vae = WAN.load(out / "pipeline" / "vae")
    sharpen_decoder(vae, recipe.sharpen, torus("train"))
    save_half(vae, out / "pipeline" / "vae")
    return reconstruction(vae, recipe)


@torch.no_grad()
def reconstruction(vae: AutoencoderKLWan, recipe: StreamRecipe) -> dict[str, float]:
    """PSNR in dB of reconstructed held-out videos: of all frames, and of each block of :data:`BLOCK` frames."""
    videos = torus("heldout", recipe.report_frames).sample(recipe.report_videos, seed=0).videos
    decoded = torch.cat([vae.decode(encode_moments(vae, part)[0]).sample for part in videos.split(8)])
    blocks = zip(decoded.split(BLOCK, dim=2), videos.split(BLOCK, dim=2), strict=True)
    figures = {f"psnr_{BLOCK * index}": round(psnr(*pair), 2) for index, pair in enumerate(blocks)}
    return {"psnr": round(psnr(decoded, videos), 2), **figures}
