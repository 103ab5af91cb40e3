"""The recipe of the tiny CogVideoX: its parts learn from the Wan pipeline what the two have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from torch.nn import functional as F

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter, CogVideoXConfig
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.config.reading import read_yaml, validate
from fastvideo.distillation.registry import load_exporter, load_method, run_schema
from fastvideo.inference.loading import load_model
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.latents import LatentSet
from fastvideo.tiny.paths import CLASSIFIER_FOLDER
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.build import COGVIDEOX, build
from tools.tiny_world.cogvideox_encoder import WanTarget, train_encoder
from tools.tiny_world.cogvideox_recipe import CogVideoXRecipe, CogVideoXVaeRecipe, ImitationRecipe
from tools.tiny_world.cogvideox_start import start_from_wan
from tools.tiny_world.cogvideox_teacher import Draws, Network, all_captions, imitate, imitation_errors
from tools.tiny_world.cogvideox_vae import build_vae, decode, kernels
from tools.tiny_world.recipe import SharpenRecipe
from tools.tiny_world.sharpen import decoder_loss, sharpen_decoder
from tools.tiny_world.train_vae import COGVIDEOX as COGVIDEOX_VAE
from tools.tiny_world.vae import encode_moments

pytestmark = pytest.mark.slow
SMALL = CogVideoXVaeRecipe(widths=(4, 4, 8, 8), steps=3, batch_size=2, warm_up=1)
SHORT = SharpenRecipe(steps=4, batch_size=2, warm_up=1, single_share=0.5)
QUICK = ImitationRecipe(videos=8, steps=12, batch_size=8, warm_up=2, ema_decay=0.5)
RECIPE = Path(__file__).parents[3] / "examples" / "distillation" / "tiny_cogvideox_dmd2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all stages but the judge write, each after a few steps."""
    out = tmp_path_factory.mktemp("cogvideox")
    TinyClassifier.load(CLASSIFIER_FOLDER).save(out / "classifier")
    recipe = replace(CogVideoXRecipe(), vae=SMALL, sharpen=SHORT, imitation=QUICK, report_videos=16)
    build(out, [name for name in COGVIDEOX.stages if name != "classifier"], recipe, COGVIDEOX)
    return out / "pipeline"


@pytest.fixture(scope="module")
def adapter(folder: Path) -> CogVideoXAdapter:
    return CogVideoXAdapter(CogVideoXConfig(path=str(folder), max_sequence_length=8))


@pytest.fixture(scope="module")
def wan() -> tuple[WanFamily, Any]:
    family = WanFamily(WanFamilyConfig())
    return family, family.folder.load_network().requires_grad_(False)


@pytest.fixture
def started(adapter: CogVideoXAdapter, wan: tuple[WanFamily, Any]) -> Any:
    network = adapter.folder.load_network()
    start_from_wan(network, wan[1], adapter.folder.grid)
    return network


def test_the_stages_write_a_pipeline_that_loads_and_says_how_it_is_sampled(folder: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert 1_900_000 < sum(p.numel() for p in pipe.transformer.parameters()) < 2_100_000
    assert pipe.scheduler.config.snr_shift_scale == 1.0
    model = load_model(str(folder))
    assert model.adapter.codec.latent_shape == (16, 3, 4, 4)
    assert model.adapter.conditioner.text_length == 8
    assert model.sampler().kind == "euler"


def test_every_caption_fits_the_text_length(adapter: CogVideoXAdapter) -> None:
    adapter.conditioner.check_prompts(all_captions())
    assert max(len(adapter.conditioner.tokenizer(caption).input_ids) for caption in all_captions()) == 8
    assert len(set(all_captions())) == 1 + 11 * 8 * 9


def test_the_recipes_ladder_is_the_one_that_stock_diffusers_samples(adapter: CogVideoXAdapter) -> None:
    config = validate(run_schema("cogvideox", "dmd2"), read_yaml(RECIPE), "recipe")
    stock = load_exporter(adapter.config).stock_sampler(config.ladder.times, load_method("dmd2").sampler)
    assert stock.times == config.ladder.times
    assert adapter.folder.grid.timestep(torch.tensor(config.ladder.times)).tolist() == [999, 749, 499, 249]


def test_single_frames_and_whole_videos_are_both_coded() -> None:
    vae, videos = build_vae(SMALL), TinyWorld("train").sample(2, seed=0).videos
    for frames, latents in ((1, 1), (9, 3)):
        mean = encode_moments(vae, videos[:, :, :frames])[0]
        assert mean.shape == (2, 16, latents, 4, 4)
        assert decode(vae, mean).shape == (2, 3, frames, 32, 32)


def test_the_encoder_comes_closer_to_the_wan_vae() -> None:
    recipe, videos = replace(SMALL, steps=25, batch_size=4, warm_up=5), TinyWorld("heldout").sample(8, seed=0).videos
    target, untrained = WanTarget(), build_vae(recipe)
    trained = train_encoder(recipe)[0]
    before, after = (target.errors(vae, videos)[0].item() for vae in (untrained, trained))
    assert after < 0.9 * before


def test_training_the_encoder_reaches_every_weight_of_it_and_repeats_bit_for_bit() -> None:
    untrained = build_vae(SMALL)
    first, second = (train_encoder(SMALL)[0].state_dict() for _ in range(2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert torch.equal(weight, untrained.state_dict()[name]) == (not name.startswith("encoder.")), name


def test_the_wan_target_is_what_the_family_encodes(wan: tuple[WanFamily, Any]) -> None:
    """The Wan VAE itself, measured against its own target, is off by its normalisation and nothing else."""
    videos = TinyWorld("heldout").sample(2, seed=0).videos
    mean = encode_moments(wan[0].codec.vae, videos)[0]
    mean_error, width_error = WanTarget().errors(wan[0].codec.vae, videos)
    torch.testing.assert_close(mean_error, (mean - wan[0].codec.encode(videos)).square().mean())
    deviation = torch.tensor(wan[0].codec.vae.config.latents_std)
    torch.testing.assert_close(width_error, (2 * deviation.log()).square().mean(), rtol=1e-4, atol=0.0)


def test_the_decoder_is_trained_on_first_frames_and_on_whole_videos() -> None:
    vae, videos = build_vae(SMALL), TinyWorld("heldout").sample(8, 0).videos
    before = [decoder_loss(vae, COGVIDEOX_VAE, videos, SHORT, single) for single in (True, False)]
    sharpen_decoder(vae, replace(SHORT, steps=20, batch_size=4), TinyWorld("train"), COGVIDEOX_VAE)
    after = [decoder_loss(vae, COGVIDEOX_VAE, videos, SHORT, single) for single in (True, False)]
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.9 * before[1]
    assert decode(vae, encode_moments(vae, videos)[0][:, :, :1]).shape[2] == 1


def test_muon_trains_the_kernels_but_the_last() -> None:
    vae = build_vae(SMALL)
    chosen = {id(p) for p in kernels(vae)}
    assert id(vae.decoder.conv_out.conv.weight) not in chosen
    assert id(vae.encoder.conv_in.conv.weight) in chosen
    assert all(p.dim() > 3 for p in vae.parameters() if id(p) in chosen)


@torch.no_grad()
def test_blocks_start_with_what_wan_adds_and_multiplies_at_a_time(
    adapter: CogVideoXAdapter, wan: tuple[WanFamily, Any], started: Any
) -> None:
    t = torch.tensor([0.05, 0.4, 0.9])  # none of them was fitted
    times = wan[1].condition_embedder
    embedded = times.time_embedder(times.timesteps_proj(1000 * t))
    wanted = wan[1].blocks[2].scale_shift_table + times.time_proj(F.silu(embedded)).unflatten(1, (6, -1))
    seen = F.silu(started.time_embedding(started.time_proj(adapter.folder.grid.timestep(t))))
    block = started.transformer_blocks[2]
    found = torch.cat([norm.linear(seen)[:, : 3 * 192] for norm in (block.norm1, block.norm2)], dim=1)
    assert (found - wanted.flatten(1)).square().mean() < 0.01 * wanted.var()


@torch.no_grad()
def test_the_head_starts_as_wans_in_the_other_order_of_channels(
    adapter: CogVideoXAdapter, wan: tuple[WanFamily, Any], started: Any
) -> None:
    """Where alpha equals sigma the velocity is `v` times the square root of 2 and nothing else."""
    hidden, t = torch.randn(1, 12, 192, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    network = wan[1]
    embedded = network.condition_embedder.time_embedder(network.condition_embedder.timesteps_proj(1000 * t))
    shift, scale = (network.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)
    u = network.proj_out(network.norm_out(hidden) * (1 + scale) + shift).view(1, 3, 2, 2, 2, 2, 16)  # f h w p q c
    seen = started.time_embedding(started.time_proj(adapter.folder.grid.timestep(t)))
    v = started.proj_out(started.norm_out(started.norm_final(hidden), temb=seen)).view(1, 3, 2, 2, 16, 2, 2)
    error = v * 2**0.5 - u.permute(0, 1, 2, 3, 6, 4, 5)
    assert error.square().mean() < 0.02 * u.var()


@torch.no_grad()
def test_patches_and_feed_forward_layers_start_as_wans(wan: tuple[WanFamily, Any], started: Any) -> None:
    x = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = wan[1].patch_embedding(x).flatten(2).transpose(1, 2)
    text = torch.zeros(2, 8, 64)
    torch.testing.assert_close(started.patch_embed(text, x.transpose(1, 2))[:, 8:], patches, rtol=1e-4, atol=1e-4)
    wide = started.transformer_blocks[1].ff.net
    wide[2].weight[:, 512:] = 0  # the units that Wan does not have
    wanted = wan[1].blocks[1].ffn(patches)
    assert (started.transformer_blocks[1].ff(patches) - wanted).square().mean() < 0.01 * wanted.var()


def test_the_transformer_learns_to_answer_like_wan(
    adapter: CogVideoXAdapter, wan: tuple[WanFamily, Any], started: Any
) -> None:
    data = LatentSet(torch.randn(32, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), ["a red seven"] * 32)
    student = Network(adapter, started, started.transformer_blocks)
    teacher = Network(wan[0], wan[1], wan[1].blocks)
    asked = Draws.of(data, replace(QUICK, seed=1)).next()
    with torch.no_grad():
        before = [error.item() for error in imitation_errors(student, teacher, *asked)]
    imitate(student, teacher, Draws.of(data, QUICK))
    with torch.no_grad():
        after = [error.item() for error in imitation_errors(student, teacher, *asked)]
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.9 * before[1]


def test_captions_are_emptied_and_replaced_in_the_shares_of_the_recipe() -> None:
    data = LatentSet(torch.zeros(4, 16, 3, 4, 4), ["a red seven"] * 4)
    draws = Draws.of(data, replace(QUICK, batch_size=4000, empty_share=0.2, other_share=0.3))
    x_t, t, captions = draws.next()
    own = all_captions().index("a red seven")
    assert (captions == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert (captions == own).float().mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(x_t.std(dim=(1, 2, 3, 4)), t, rtol=0.2, atol=0.01)
