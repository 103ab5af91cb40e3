"""The shipped weights do what the README says: the judge reads, the VAE reconstructs, stock diffusers loads the folder.

Figures are taken on fewer videos than the published ones, so each bar leaves room for the smaller sample.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.inference.loading import load_model
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER, PIPELINE_FOLDER, WEIGHTS
from fastvideo.tiny.world import TinyWorld, WorldSample
from tools.tiny_world.recipe import TextRecipe
from tools.tiny_world.teacher import GUIDANCE, install, sampling
from tools.tiny_world.train_classifier import accuracy
from tools.tiny_world.train_vae import vae_quality
from tools.tiny_world.vae import decode_unclamped, encode_moments


@pytest.fixture(scope="module")
def judge() -> TinyClassifier:
    return TinyClassifier.load(CLASSIFIER_FOLDER)


@pytest.fixture(scope="module")
def adapter() -> WanFamily:
    return WanFamily(WanFamilyConfig())


@pytest.fixture(scope="module")
def vae(adapter: WanFamily) -> AutoencoderKLWan:
    return adapter.codec.vae


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(PIPELINE_FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def heldout() -> WorldSample:
    return TinyWorld("heldout").sample(512, seed=21)


def test_the_judge_reads_heldout_videos(judge: TinyClassifier, heldout: WorldSample) -> None:
    right = accuracy(judge, heldout)
    assert right["digit"] >= 0.98
    assert right["colour"] >= 0.99
    assert right["direction"] >= 0.99


def test_the_judge_has_features_and_is_frozen(judge: TinyClassifier, heldout: WorldSample) -> None:
    features = judge.features(heldout.videos[:4])
    assert features.shape == (4, 64)
    assert not features.requires_grad
    assert not judge.training


@pytest.mark.slow
def test_the_vae_keeps_heldout_digits_readable(vae: AutoencoderKLWan, judge: TinyClassifier) -> None:
    quality = vae_quality(vae, judge, samples=256, seed=22)
    assert quality.psnr >= 30.0
    assert quality.digit_accuracy >= 0.95
    assert quality.colour_accuracy >= 0.98
    assert quality.direction_accuracy >= 0.98


def test_latents_have_unit_variance_per_channel(adapter: WanFamily, heldout: WorldSample) -> None:
    latents = adapter.codec.encode(heldout.videos[:128])
    assert latents.shape == (128, 16, 3, 4, 4)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    assert mean.abs().max() < 0.15
    assert (std - 1.0).abs().max() < 0.15


def test_the_unclamped_decode_is_decode_without_its_clamp(vae: AutoencoderKLWan, heldout: WorldSample) -> None:
    raw = encode_moments(vae, heldout.videos[:2])[0]
    video = decode_unclamped(vae, raw)
    assert video.min() < -1.0
    torch.testing.assert_close(video.clamp(-1.0, 1.0), vae.decode(raw).sample, rtol=0.0, atol=0.0)


def test_stock_pipeline_runs(pipe: WanPipeline) -> None:
    result = pipe(
        "a green seven moving up and left",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.5,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    assert result.frames.shape == (1, 9, 3, 32, 32)
    assert torch.isfinite(result.frames).all()


def test_words_have_distinct_embeddings_of_unit_scale(pipe: WanPipeline) -> None:
    captions = ["a green seven moving up", "a blue seven moving up", "a green eight moving up", ""]
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    assert tokens.attention_mask.sum(dim=1).tolist() == [6, 6, 6, 1]  # the end token included
    assert pipe.tokenizer.unk_token_id not in tokens.input_ids
    embeddings = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    assert embeddings[0, :6].std().item() == pytest.approx(1.0, abs=0.2)
    cosine = torch.nn.functional.cosine_similarity(embeddings[0, :6], embeddings[1, :6], dim=1)
    assert cosine[1] < 0.6  # "green" against "blue"
    assert cosine[2] > 0.6  # "seven" both times


def test_tokenizer_knows_the_length_that_the_pipeline_was_trained_with(pipe: WanPipeline) -> None:
    assert pipe.tokenizer.model_max_length == 16


def test_shipped_weights_are_small() -> None:
    files = [path for path in Path(WEIGHTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 34 * 2**20


def test_the_teacher_is_sampled_with_the_guidance_that_was_found_best() -> None:
    spec = load_model("tiny").sampler()
    assert (spec.kind, spec.guidance) == ("euler", GUIDANCE)


def test_a_copy_of_an_installed_pipeline_is_sampled_like_the_embedded_one(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE_FOLDER, folder)
    install(PIPELINE_FOLDER, folder, sampling(GUIDANCE, TextRecipe()))
    copy, embedded = load_model(str(folder)), load_model("tiny")
    assert copy.sampler().guidance == GUIDANCE
    assert copy.adapter.config.model_copy(update={"path": "tiny"}) == WanFamilyConfig()
    assert copy.adapter.codec.latent_shape == embedded.adapter.codec.latent_shape
    for name, weight in embedded.network.state_dict().items():
        assert torch.equal(weight, copy.network.state_dict()[name])
    assert json.loads((folder / "recipe.json").read_text())["sampler"] == "euler"
