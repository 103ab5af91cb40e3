"""Cached latents are never stale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from fastvideo.distillation.adapters.wan import WanAdapter, WanConfig
from fastvideo.tiny.latents import cache_key, cached_latents
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import TinyWorld


@dataclass
class Codec:
    """The shipped VAE as the latent codec of a model family."""

    vae: AutoencoderKLWan
    latent_key: str = "first"

    @torch.no_grad()
    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(videos).latent_dist.mean


@pytest.fixture
def codec() -> Codec:
    vae = AutoencoderKLWan.from_pretrained(PIPELINE_FOLDER, subfolder="vae", torch_dtype=torch.float32)
    return Codec(vae.eval().requires_grad_(False))


def test_latents_are_encoded_once_and_read_back(codec: Codec, tmp_path: Path) -> None:
    first = cached_latents(codec, n=5, seed=1, folder=tmp_path)
    again = cached_latents(codec, n=5, seed=1, folder=tmp_path)
    world = TinyWorld("train").sample(5, seed=1)
    assert torch.equal(first.latents, codec.encode(world.videos))
    assert torch.equal(first.latents, again.latents)
    assert first.captions == again.captions == world.captions
    assert len(list(tmp_path.iterdir())) == 1


def test_another_codec_or_draw_has_another_key(codec: Codec) -> None:
    key = cache_key(codec, 5, 1, "train")
    assert key == cache_key(codec, 5, 1, "train")
    others = [cache_key(codec, 6, 1, "train"), cache_key(codec, 5, 2, "train"), cache_key(codec, 5, 1, "heldout")]
    assert key not in [*others, cache_key(Codec(codec.vae, "second"), 5, 1, "train")]


def test_the_codec_key_changes_with_the_weights_of_the_vae() -> None:
    first, second = (WanAdapter(WanConfig(path="tiny")) for _ in range(2))
    with torch.no_grad():
        second.codec.vae.quant_conv.bias += 1e-3
    assert first.codec.latent_key != second.codec.latent_key
