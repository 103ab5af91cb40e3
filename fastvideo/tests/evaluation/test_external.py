"""CLIP score and FVD with small made-up weights, whose truth is known; VBench by its own file format, and by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastvideo.distillation.builder import initialising
from fastvideo.distillation.rng import seeded
from fastvideo.errors import UserError
from fastvideo.evaluation.choice import absent, choose, external_metrics
from fastvideo.evaluation.external import ClipScore, VBench, VideoDistance
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


PACKAGE = """
import json, os
import av

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input"
        if dimension_list == ["subject_consistency"]:
            raise NotImplementedError("UnImplemented dimension subject_consistency!, No module named 'timm'")
        found = []
        for file in reversed(sorted(os.listdir(videos_path))):
            frames = [frame.to_ndarray(format="gray").mean() for frame in
                      av.open(os.path.join(videos_path, file)).decode(video=0)]
            found.append({"video_path": os.path.join(videos_path, file), "video_results": sum(frames) / len(frames)})
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as out:
            json.dump({dimension: [0.0, found] for dimension in dimension_list}, out)
"""
"""The interface of vbench 0.1.5; scores are the brightness of a video, 0 to 255, and files come in another order."""


def measured(metric: VBench) -> dict[str, float]:
    bright = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1).expand(2, 3, 9, 32, 32)
    seen = metric.observe(batch_of(bright, ("a", "b")))
    figures = metric.figures(seen, {}, resample_counts(2, 0))
    return {name: figure.value for name, figure in figures.items() if isinstance(figure, Estimate)}


def test_vbench_is_called_and_read_by_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "vbench", sys)  # so that the package is gone after the test
    del sys.modules["vbench"]
    assert choose(("vbench_dynamic_degree",), None, None).names == ("vbench_dynamic_degree",)
    metric = VBench(["dynamic_degree", "imaging_quality"], "cpu", 8)
    found = measured(metric)
    assert found["vbench_dynamic_degree"] == pytest.approx(255 / 2, abs=3)
    assert found["vbench_imaging_quality"] == pytest.approx(2.55 / 2, abs=0.03)
    dark, bright = metric._scores("dynamic_degree", [metric._file(0), metric._file(1)]).tolist()
    assert dark < 5 < 250 < bright
    with pytest.raises(UserError, match=r"vbench_subject_consistency: .*No module named 'timm'; it needs pip install"):
        measured(VBench(["subject_consistency"], "cpu", 8))


def test_vbench_itself_measures_the_videos() -> None:
    """A dimension without weights: still videos do not flicker."""
    pytest.importorskip("vbench", reason="VBench is not installed")
    assert measured(VBench(["temporal_flickering"], "cpu", 8))["vbench_temporal_flickering"] == pytest.approx(1.0)
