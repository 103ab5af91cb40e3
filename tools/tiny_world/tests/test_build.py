"""The recipe rebuilds every part."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from fastvideo.distillation.chunks import Reach
from fastvideo.inference.loading import load_model
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world import stream, teacher
from tools.tiny_world.build import STREAM, build
from tools.tiny_world.muon import orthogonalise
from tools.tiny_world.recipe import ClassifierRecipe, SharpenRecipe, TinyRecipe, VaeRecipe
from tools.tiny_world.sharpen import decoder_loss, sharpen_decoder
from tools.tiny_world.train_vae import WAN, train_vae
from tools.tiny_world.vae import build_vae, encode_moments

pytestmark = pytest.mark.slow
SHORT_RUN = {"--trainer.max-steps": "2", "--trainer.log-every": "1", "--data.size": "8", "--data.batch-size": "2"}
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
    sharpen_decoder(small_vae, recipe, TinyWorld("train"))
    assert torch.equal(encode_moments(small_vae, videos)[0], latents)
    assert decoder_loss(small_vae, WAN, videos, recipe) < 0.9 * before
    assert not any(p.requires_grad for p in small_vae.parameters())


@pytest.mark.slow
def test_teacher_stage_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher stage runs the recipe three times, 2 steps each here, and installs the last weights."""
    run = teacher.distil
    monkeypatch.setattr(
        teacher, "distil", lambda config, pipe, out, flags: run(config, pipe, out, {**flags, **SHORT_RUN})
    )
    shutil.copytree(PIPELINE_FOLDER, tmp_path / "pipeline")
    build(tmp_path, ["teacher"], TinyRecipe())
    installed = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "teacher-3" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(installed[name], trained[name].half()) for name in trained)


@pytest.mark.slow
def test_teacher_stage_of_streams_says_how_it_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = teacher.distil
    monkeypatch.setattr(
        teacher, "distil", lambda config, pipe, out, flags: run(config, pipe, out, {**flags, **SHORT_RUN})
    )
    shutil.copytree(PIPELINE_FOLDER, tmp_path / "pipeline")
    build(tmp_path, ["teacher"], STREAM.recipe, STREAM)
    sampler = load_model(str(tmp_path / "pipeline")).sampler()
    assert sampler.reach == Reach(1, window=6, sink=1)
    assert (sampler.kind, sampler.guidance) == ("euler", stream.GUIDANCE)
    assert json.loads((tmp_path / "pipeline" / "recipe.json").read_text())["model"]["num_frames"] == 33


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
