"""The recipe rebuilds every part, and cached latents are never stale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from fastvideo.distillation.adapters.wan import WanAdapter, WanConfig
from fastvideo.tiny.build import build
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.latents import cache_key, cached_latents
from fastvideo.tiny.muon import orthogonalise
from fastvideo.tiny.recipe import ClassifierRecipe, SharpenRecipe, TinyRecipe, VaeRecipe
from fastvideo.tiny.sharpen import decoder_loss, sharpen_decoder
from fastvideo.tiny.train_vae import WAN, train_vae
from fastvideo.tiny.vae import build_vae, encode_moments
from fastvideo.tiny.world import TinyWorld

SHORT = SharpenRecipe(steps=2, batch_size=2, warm_up=1)
SMALL = VaeRecipe(encoder_width=8, decoder_width=8, steps=3, batch_size=2, warm_up=1, statistics_videos=16)


def test_all_stages_write_a_pipeline_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"classifier": ClassifierRecipe(steps=3, batch_size=4), "vae": SMALL, "sharpen": SHORT}
    recipe = replace(TinyRecipe(), **parts, report_videos=16)
    build(tmp_path, ["classifier", "vae", "decoder", "text", "transformer"], recipe)
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    assert pipe.vae.config.base_dim == 8
    assert pipe.scheduler.config.shift == recipe.transformer.shift
    assert isinstance(TinyClassifier.load(tmp_path / "classifier"), TinyClassifier)
    assert capsys.readouterr().out.count("wall_seconds") == 5


def test_a_sharper_decoder_leaves_the_latents_alone(small_vae: AutoencoderKLWan) -> None:
    videos = TinyWorld("heldout").sample(8, 0).videos
    recipe = replace(SHORT, steps=12, batch_size=8, warm_up=2)
    latents, before = encode_moments(small_vae, videos)[0], decoder_loss(small_vae, WAN, videos, recipe)
    sharpen_decoder(small_vae, recipe)
    assert torch.equal(encode_moments(small_vae, videos)[0], latents)
    assert decoder_loss(small_vae, WAN, videos, recipe) < 0.9 * before
    assert not any(p.requires_grad for p in small_vae.parameters())


def test_vae_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = train_vae(SMALL).state_dict(), train_vae(SMALL).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_muon_orthogonalises() -> None:
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    torch.testing.assert_close(orthogonalise(matrix.T), orthogonalise(matrix).T)


@pytest.fixture
def small_vae() -> AutoencoderKLWan:
    return build_vae(SMALL).eval().requires_grad_(False)


@dataclass
class Codec:
    """The small VAE as the latent codec of a model family."""

    vae: AutoencoderKLWan
    latent_key: str = "first"

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        return encode_moments(self.vae, videos)[0]


def test_latents_are_encoded_once_and_read_back(small_vae: AutoencoderKLWan, tmp_path: Path) -> None:
    codec = Codec(small_vae)
    first = cached_latents(codec, n=5, seed=1, folder=tmp_path)
    again = cached_latents(codec, n=5, seed=1, folder=tmp_path)
    world = TinyWorld("train").sample(5, seed=1)
    assert torch.equal(first.latents, codec.encode(world.videos))
    assert torch.equal(first.latents, again.latents)
    assert first.captions == again.captions == world.captions
    assert len(list(tmp_path.iterdir())) == 1


def test_another_codec_or_draw_has_another_key(small_vae: AutoencoderKLWan) -> None:
    codec = Codec(small_vae)
    key = cache_key(codec, 5, 1, "train")
    assert key == cache_key(codec, 5, 1, "train")
    others = [cache_key(codec, 6, 1, "train"), cache_key(codec, 5, 2, "train"), cache_key(codec, 5, 1, "heldout")]
    assert key not in [*others, cache_key(Codec(small_vae, "second"), 5, 1, "train")]


def test_the_codec_key_changes_with_the_weights_of_the_vae() -> None:
    first, second = (WanAdapter(WanConfig(path="tiny")) for _ in range(2))
    with torch.no_grad():
        second.codec.vae.quant_conv.bias += 1e-3
    assert first.codec.latent_key != second.codec.latent_key
