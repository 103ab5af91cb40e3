"""The shipped tiny CogVideoX does what its page says: stock diffusers loads it, it reconstructs, it follows captions.

Figures are taken on fewer videos than the published ones, so each bar leaves room for the smaller sample.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

from fastvideo.distillation.config.reading import read_yaml, validate
from fastvideo.distillation.registry import run_schema
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER, COGVIDEOX_FOLDER
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.cogvideox_teacher import GUIDANCE, all_captions
from tools.tiny_world.train_vae import vae_quality

RECIPES = Path(__file__).parents[3] / "examples" / "distillation"
CAPTION = "a green seven moving up and left"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny_cogvideox")


@pytest.fixture(scope="module")
def judge() -> TinyClassifier:
    return TinyClassifier.load(CLASSIFIER_FOLDER)


def test_stock_diffusers_makes_the_asked_video(judge: TinyClassifier) -> None:
    pipe = CogVideoXPipeline.from_pretrained(COGVIDEOX_FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        [CAPTION] * 4,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=12,
        guidance_scale=GUIDANCE,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert video.shape == (4, 9, 3, 32, 32)
    right = judge.read(2 * video.transpose(1, 2) - 1) == torch.tensor([7, 1, 4])
    assert right.float().mean(dim=0).min() >= 0.75


@pytest.mark.slow
def test_the_vae_keeps_heldout_digits_readable(model: LoadedModel, judge: TinyClassifier) -> None:
    quality = vae_quality(model.adapter.codec.vae, judge, samples=128, seed=22)
    assert quality.psnr >= 34.0
    assert quality.digit_accuracy >= 0.97
    assert quality.colour_accuracy >= 0.98
    assert quality.direction_accuracy >= 0.98


def test_latents_are_normal_in_every_channel_and_those_of_the_wan_vae(model: LoadedModel) -> None:
    videos = TinyWorld("heldout").sample(128, seed=21).videos
    latents = model.adapter.codec.encode(videos)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    assert mean.abs().max() < 0.15
    assert (std - 1.0).abs().max() < 0.15
    assert (latents - load_model("tiny").adapter.codec.encode(videos)).square().mean() < 0.02


def test_it_answers_like_the_wan_teacher(model: LoadedModel) -> None:
    wan, generator = load_model("tiny"), torch.Generator().manual_seed(0)
    sample = TinyWorld("heldout").sample(64, seed=23)
    x0, t = wan.adapter.codec.encode(sample.videos), torch.linspace(0.02, 0.98, 64)
    at = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - at) * x0 + at * torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        ours, theirs = (
            m.adapter.velocity(m.network, x_t, t, m.adapter.conditioner.encode_prompts(sample.captions))
            for m in (model, wan)
        )
    assert (ours - theirs).square().mean() < 0.03 * theirs.square().mean()


def test_it_is_small_and_sampled_with_the_guidance_that_was_found_best(model: LoadedModel) -> None:
    files = [path for path in COGVIDEOX_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    assert (model.sampler().kind, model.sampler().guidance) == ("euler", GUIDANCE)
    assert (model.adapter.conditioner.text_length, model.adapter.codec.latent_shape) == (8, (16, 3, 4, 4))
    model.adapter.conditioner.check_prompts(all_captions())


@pytest.mark.parametrize("recipe", ["tiny_cogvideox_dmd2", "tiny_cogvideox_sft"])
def test_the_recipes_fit_the_shipped_model(recipe: str, model: LoadedModel) -> None:
    values = read_yaml(RECIPES / f"{recipe}.yaml")
    config = validate(run_schema(values["distill_model"], values["distill_method"]), values, recipe)
    assert config.model.path == "tiny_cogvideox"
    assert config.model.max_sequence_length == model.adapter.conditioner.text_length
