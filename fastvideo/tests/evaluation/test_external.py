"""CLIP score and FVD with small made-up weights, whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastvideo.distillation.rng import initialising, seeded
from fastvideo.evaluation.choice import absent, choose, external_metrics
from fastvideo.evaluation.external import ClipScore, VideoDistance
from fastvideo.evaluation.metric import Batch
from fastvideo.evaluation.statistics import Estimate, resample_counts
from fastvideo.tests.evaluation.runs import moving_dots


class Means(nn.Module):
    """Mean of each channel, as features of a video."""

    def forward(self, videos: Tensor) -> Tensor:
        return videos.mean((2, 3, 4))


class Switched(nn.Module):
    """The arguments of StyleGAN-V's I3D; it shows what it was given."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        scaled = x / 127.5 - 1 if rescale else x
        return scaled.mean((2, 3, 4)) + (0.0 if resize and return_features else 100.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of one layer with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    with initialising(0):
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return str(folder)


def batch_of(videos: Tensor, prompts: tuple[str, ...] = ("a dot", "the b", "c")) -> Batch:
    batch = Batch(prompts, range(len(videos)), videos, None)  # type: ignore[arg-type]
    batch.videos = videos  # decoded already
    return batch


def test_clip_score_is_the_cosine_of_a_still_and_its_prompt(clip: str) -> None:
    still = moving_dots(3)[:, :, :1].expand(-1, -1, 9, -1, -1)
    metric = ClipScore(clip, "cpu")
    score = metric.observe(batch_of(still))["score"]
    pixels = metric.images(
        images=list(((still[:, :, 0] + 1) * 127.5).round().byte().numpy()),
        return_tensors="pt",
        input_data_format="channels_first",
    )
    text = metric.tokenizer(["a dot", "the b", "c"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = metric.model(**text, **pixels).logits_per_image / metric.model.logit_scale.exp()
    torch.testing.assert_close(score.float(), 100 * logits.diagonal())
    figure = metric.figures({"score": score}, {}, resample_counts(3, 0))["clip_score"]
    assert isinstance(figure, Estimate)
    assert figure.value == pytest.approx(float(score.mean()))


def test_fvd_of_a_shift_is_its_square(tmp_path: Path) -> None:
    """Features are means of three channels; all videos are brighter by 0.5."""
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    metric = VideoDistance(tmp_path / "means.pt", "cpu")
    videos = 0.2 * torch.randn(8, 3, 4, 6, 6, generator=seeded(0))
    teacher, model = (metric.observe(batch_of(v)) for v in (videos, videos + 0.5))
    figure = metric.figures(model, teacher, resample_counts(8, 0))["fvd"]
    assert isinstance(figure, Estimate)
    assert figure.value == pytest.approx(3 * 0.25, rel=1e-4)


def test_the_common_i3d_file_gets_bytes_and_its_switches(tmp_path: Path) -> None:
    torch.jit.script(Switched()).save(str(tmp_path / "i3d.pt"))
    videos = torch.full((2, 3, 4, 6, 6), 0.25)
    features = VideoDistance(tmp_path / "i3d.pt", "cpu").observe(batch_of(videos))["features"]
    torch.testing.assert_close(features, torch.full((2, 3), 0.25))


def test_given_weights_are_measured_and_the_others_named(clip: str, tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    choice = choose((), clip, tmp_path / "means.pt")
    assert choice.names[-2:] == ("clip_score", "fvd")
    assert [name for name, _ in absent(choice)] == ["vbench"]
    assert [type(metric) for metric in external_metrics(choice, "cpu")] == [ClipScore, VideoDistance]
    assert [name for name, _ in absent(choose(("motion",), None, None))] == ["clip_score", "fvd", "vbench"]
