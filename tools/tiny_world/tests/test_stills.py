"""The teachers of the soft world: their recipes run, and what ships does what its page says.

Figures are taken on fewer samples than the published ones, so each bar leaves room for the smaller sample.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from fastvideo.evaluation.stills import sampled_stills, sharpness, shown
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER, STILLS_FOLDER
from fastvideo.tiny.world import TinyWorld, stills
from tools.tiny_world import teacher
from tools.tiny_world.build import SOFT, STILLS, build
from tools.tiny_world.stills import GUIDANCE, STEPS, StillsRecipe
from tools.tiny_world.stills_vae import StillsVaeRecipe, reconstruction

SHORT_RUN = {"--trainer.max-steps": "2", "--trainer.log-every": "1", "--data.size": "8", "--data.batch-size": "2"}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny_stills")


@pytest.mark.slow
def test_all_stages_write_pipelines_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = teacher.distil
    monkeypatch.setattr(
        teacher, "distil", lambda config, pipe, out, flags: run(config, pipe, out, {**flags, **SHORT_RUN})
    )
    small = StillsVaeRecipe(widths=(4, 4, 8), steps=2, batch_size=2, warm_up=1, statistics_videos=8)
    recipe = replace(StillsRecipe(), vae=small, report_stills=16)
    build(tmp_path / "stills", list(STILLS.stages), recipe, STILLS)
    build(tmp_path / "soft", list(SOFT.stages), SOFT.recipe, SOFT)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "stills" / "pipeline", torch_dtype=torch.float32)
    assert pipe.unet.config.sample_size == 8
    sampler = load_model(str(tmp_path / "stills" / "pipeline")).sampler()
    assert (sampler.kind, sampler.guidance, len(sampler.times)) == ("euler", GUIDANCE, STEPS)
    assert load_model(str(tmp_path / "soft" / "pipeline")).sampler().guidance == teacher.GUIDANCE


def test_stock_diffusers_makes_the_asked_still() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(STILLS_FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a green seven"] * 8,
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (8, 3, 32, 32)
    assert shown(2 * images.unsqueeze(2) - 1, ["a green seven"] * 8)["digit"] >= 0.75


@pytest.mark.slow
def test_the_autoencoder_keeps_heldout_digits_readable(model: LoadedModel) -> None:
    quality = reconstruction(model.adapter.codec.vae, TinyClassifier.load(CLASSIFIER_FOLDER), 256)
    assert quality["digit"] >= 0.97
    assert quality["psnr"] >= 40.0


@pytest.mark.slow
def test_its_own_stills_show_what_captions_name_and_are_sharp(model: LoadedModel) -> None:
    sample = stills("heldout").sample(96, seed=0)
    made = sampled_stills(model, sample.captions, model.sampler())
    found = shown(made, sample.captions)
    assert found["digit"] >= 0.88
    assert found["colour"] >= 0.95
    assert sharpness(made) >= 0.7 * sharpness(sample.videos)


def test_latents_have_unit_variance(model: LoadedModel) -> None:
    latents = model.adapter.codec.encode(stills("heldout").sample(128, seed=1).videos)
    assert latents.shape == (128, 4, 1, 8, 8)
    assert latents.square().mean().sqrt() == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_the_soft_teacher_makes_soft_videos() -> None:
    soft, prompts = load_model("tiny_soft"), TinyWorld("heldout").sample_captions(32, 0)
    videos = sampled_stills(soft, prompts, soft.sampler(12))
    assert sharpness(videos) <= 0.35 * sharpness(TinyWorld("heldout").sample(32, 0).videos)
