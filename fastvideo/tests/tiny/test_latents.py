"""Cached latents are never stale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.builder import build_adapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.tiny.latents import cache_key, cached_latents
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import TinyWorld, torus
from fastvideo.training.data import open_source


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
    first = cached_latents(codec, TinyWorld("train"), n=5, seed=1, folder=tmp_path)
    again = cached_latents(codec, TinyWorld("train"), n=5, seed=1, folder=tmp_path)
    world = TinyWorld("train").sample(5, seed=1)
    assert torch.equal(first.latents, codec.encode(world.videos))
    assert torch.equal(first.latents, again.latents)
    assert first.captions == again.captions == world.captions
    assert len(list(tmp_path.iterdir())) == 1


def test_another_codec_or_draw_has_another_key(codec: Codec) -> None:
    train = TinyWorld("train")
    key = cache_key(codec, train, 5, 1)
    assert key == cache_key(codec, TinyWorld("train"), 5, 1)
    worlds = [TinyWorld("heldout"), TinyWorld("train", frames=33), torus("train", frames=train.frames)]
    others = [cache_key(codec, world, 5, 1) for world in worlds]
    others += [cache_key(codec, train, 6, 1), cache_key(codec, train, 5, 2)]
    assert key not in [*others, cache_key(Codec(codec.vae, "second"), train, 5, 1)]
    assert len(set(others)) == len(others)


def test_the_codec_key_changes_with_the_weights_of_the_vae() -> None:
    first, second = (WanFamily(WanFamilyConfig(path="tiny")) for _ in range(2))
    with torch.no_grad():
        second.codec.vae.quant_conv.bias += 1e-3
    assert first.codec.latent_key != second.codec.latent_key


def test_a_run_trains_on_videos_of_the_world_that_its_config_names(tmp_path: Path) -> None:
    values = {
        "distill_model": "wan",
        "distill_method": "sft",
        "output": str(tmp_path / "run"),
        "model": {"num_frames": 17},
        "method": {},
        "roles": {"student": {"trainable": True}},
        "data": {"path": "tiny_stream", "size": 3, "batch_size": 2, "cache": str(tmp_path)},
    }
    config = validate(run_schema("wan", "sft"), values, "test")
    adapter = build_adapter(config)
    source, description = open_source(config, adapter)
    world = torus("train", frames=17).sample(3, config.seed)
    read = source.read(range(3))
    assert torch.equal(read.latents, adapter.codec.encode(world.videos))
    assert list(read.captions) == world.captions
    assert description == "3 videos of the world 'tiny_stream'"
