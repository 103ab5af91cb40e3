"""The recipe of the tiny CogVideoX pipeline: every part is built, and the VAE's latents are normal without a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter, CogVideoXConfig
from fastvideo.distillation.builder import load_method, run_schema
from fastvideo.distillation.config import read_yaml, validate
from fastvideo.tiny.build import FAMILIES, build
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.cogvideox_recipe import CogVideoXRecipe, CogVideoXVaeRecipe
from fastvideo.tiny.cogvideox_vae import build_vae, decode, fold_deviation, kernels
from fastvideo.tiny.pipeline import CLASSIFIER_FOLDER
from fastvideo.tiny.train_vae import COGVIDEOX, measure_statistics, train_vae
from fastvideo.tiny.vae import encode_moments
from fastvideo.tiny.world import TinyWorld

SMALL = CogVideoXVaeRecipe(widths=(4, 4, 8, 8), steps=3, batch_size=2, warm_up=1, statistics_videos=16)
RECIPE = Path(__file__).parents[3] / "examples" / "distillation" / "tiny_cogvideox_dmd2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first stages write, with a VAE of three steps."""
    out = tmp_path_factory.mktemp("cogvideox")
    TinyClassifier.load(CLASSIFIER_FOLDER).save(out / "classifier")
    recipe = replace(CogVideoXRecipe(), vae=SMALL, report_videos=16)
    build(out, ["vae", "text", "transformer"], recipe, FAMILIES["cogvideox"])
    return out / "pipeline"


def test_the_stages_write_a_pipeline_that_loads(folder: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert 2_000_000 < sum(p.numel() for p in pipe.transformer.parameters()) < 2_500_000
    assert pipe.scheduler.config.snr_shift_scale == 1.0
    adapter = CogVideoXAdapter(CogVideoXConfig(path=str(folder)))
    assert adapter.latent_shape == (16, 3, 4, 4)
    u = adapter.velocity(
        adapter.load_network(), torch.zeros(1, 16, 3, 4, 4), torch.ones(1), adapter.encode_prompts([""])
    )
    assert u.isfinite().all()


def test_the_recipes_ladder_is_the_one_that_stock_diffusers_samples(folder: Path) -> None:
    values = read_yaml(RECIPE)
    config = validate(run_schema("cogvideox", "dmd2"), values, "recipe")
    adapter = CogVideoXAdapter(CogVideoXConfig(path=str(folder)))
    assert adapter.stock_sampler(config.ladder.times, load_method("dmd2").sampler).times == config.ladder.times
    assert adapter.grid.timestep(torch.tensor(config.ladder.times)).tolist() == [999, 749, 499, 249]


def test_single_frames_and_whole_videos_are_both_coded() -> None:
    vae, videos = build_vae(SMALL), TinyWorld("train").sample(2, seed=0).videos
    for frames, latents in ((1, 1), (9, 3)):
        mean = encode_moments(vae, videos[:, :, :frames])[0]
        assert mean.shape == (2, 16, latents, 4, 4)
        assert decode(vae, mean).shape == (2, 3, frames, 32, 32)


def test_training_reaches_every_weight_and_repeats_bit_for_bit() -> None:
    untrained = build_vae(SMALL).state_dict()
    first, second = (train_vae(SMALL, COGVIDEOX).state_dict() for _ in range(2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert not torch.equal(weight, untrained[name]), name


def test_muon_trains_the_kernels_but_the_last() -> None:
    vae = build_vae(SMALL)
    chosen = {id(p) for p in kernels(vae)}
    assert id(vae.decoder.conv_out.conv.weight) not in chosen
    assert id(vae.encoder.conv_in.conv.weight) in chosen
    assert all(p.dim() > 3 for p in vae.parameters() if id(p) in chosen)


@torch.no_grad()
def test_folding_the_deviation_makes_latents_normal_and_changes_no_video() -> None:
    vae, videos = build_vae(SMALL), TinyWorld("train").sample(4, seed=0).videos
    mean, log_variance = encode_moments(vae, videos)
    before = decode(vae, mean)
    std = measure_statistics(vae, SMALL)[1]
    fold_deviation(vae, std)
    after, after_log_variance = encode_moments(vae, videos)
    scale = std.float().view(1, -1, 1, 1, 1)
    torch.testing.assert_close(after * scale, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after_log_variance + 2 * scale.log(), log_variance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode(vae, after), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measure_statistics(vae, SMALL)[1].float(), torch.ones(16), rtol=1e-4, atol=1e-4)
