"""A streaming student for FastVideo and for Self-Forcing's code: its names lead back to the same weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from fastvideo.cli import main
from fastvideo.distillation.adapters.export.streaming import visible_frames, warped_steps
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.inference.loading import load_model
from fastvideo.tests.inference.exporting import export

STREAMING = {"chunk": 1, "window": 2, "sink": 1, "positions": "window", "context_time": 0.0}
PUBLISHED = [1.0, 0.9375, 0.8333333333, 0.625]


@pytest.fixture
def streaming(student: Callable[..., Path]) -> Path:
    return student(streaming=STREAMING, ladder=PUBLISHED)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict())


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_the_published_ladder_is_the_published_steps() -> None:
    found = warped_steps(PUBLISHED)
    assert (found.steps, found.shift) == ((1000, 750, 500, 250), 5.0)


@pytest.mark.parametrize("times", [(1.0, 0.757, 0.522), (1.0,), uniform_ladder(4, shift=3.0).times, (1.0, 0.12345)])
def test_any_ladder_is_met_to_half_a_step(times: tuple[float, ...]) -> None:
    found = warped_steps(times).times
    assert max(abs(own - asked) for own, asked in zip(found, times, strict=True)) <= 5e-4 + 1e-9


def test_their_window_counts_sink_and_chunk() -> None:
    longlive = Reach.from_visible(3, 12, 3)
    assert visible_frames(longlive, 21) == 12
    assert (visible_frames(Reach(3), 21), visible_frames(Reach(3), 33)) == (-1, 33)


def test_a_folder_for_fastvideo(streaming: Path, tmp_path: Path) -> None:
    out = export(streaming, tmp_path / "out", "--to", "fastvideo")
    index, network = read(out / "model_index.json"), read(out / "transformer" / "config.json")
    assert index["_class_name"] == "WanCausalDMDPipeline"
    assert index["transformer"] == ["diffusers", "CausalWanTransformer3DModel"]
    assert index["vae"][0] == "diffusers"
    assert index["scheduler"] == ["diffusers", "SelfForcingFlowMatchScheduler"]
    scheduler = read(out / "scheduler" / "scheduler_config.json")
    assert (scheduler["shift"], scheduler["sigma_min"], scheduler["num_inference_steps"]) == (5.0, 0.0, 1000)
    assert network["_class_name"] == "CausalWanTransformer3DModel"
    assert (network["num_frames_per_block"], network["local_attn_size"], network["sink_size"]) == (1, 4, 1)
    assert network["rope_cache_policy"] == "relativistic"
    assert equal(weights(out), weights(streaming))
    assert "dmd_denoising_steps" not in (out / "README.md").read_text(), "the published steps are its default"


def test_a_file_for_self_forcing(streaming: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(streaming, tmp_path / "out", "--to", "self-forcing")
    content = torch.load(out / "generator.pt", weights_only=True)
    (key,) = content
    assert key == f"generator{'_ema' if read(streaming / 'recipe.json')['weights'] == 'ema' else ''}"
    names = {name.removeprefix("model."): value for name, value in content[key].items()}
    assert all(name.startswith("model.") for name in content[key])
    assert "blocks.0.self_attn.q.weight" in names
    assert equal(convert_wan_transformer_to_diffusers(checkpoint=dict(names)), weights(streaming))
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["denoising_step_list"], config["num_frame_per_block"]) == ([1000, 750, 500, 250], 1)
    assert config["model_kwargs"] == {"timestep_shift": 5.0, "local_attn_size": 4, "sink_size": 1}
    said = capsys.readouterr().err
    assert "16x32 and 2 blocks" in said
    assert "positions that move" in said
    assert "8 tokens" in said


def test_noise_on_finished_chunks_is_a_warning_in_both(
    student: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = student(streaming=STREAMING | {"context_time": 0.1})
    for to in ("fastvideo", "self-forcing"):
        export(folder, tmp_path / to, "--to", to)
        assert "finished chunks carry noise 0.1 in training" in capsys.readouterr().err


def test_such_a_file_is_a_roles_start(streaming: Path, tmp_path: Path) -> None:
    out = export(streaming, tmp_path / "out", "--format", "self-forcing")
    model = load_model(str(streaming))
    start = model.adapter.folder.load_network(str(out / "generator.pt"))
    assert equal(dict(start.state_dict()), dict(model.network.state_dict()))


def test_our_folder_says_first_that_stock_diffusers_is_not_its_sampler(
    streaming: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(streaming, tmp_path / "out")
    said, card = capsys.readouterr(), (out / "README.md").read_text()
    body = card.split("---\n", 2)[2].split("\n\n")
    assert body[1].startswith("**Stock `WanPipeline` is not its sampler**")
    assert "see the 2 before them and the first 1" in body[1]
    assert "WanPipeline.from_pretrained" not in card + said.out
    assert "samples all frames at once" in said.err
    assert read(out / "recipe.json")["streaming"] == STREAMING
    assert read(out / "scheduler" / "scheduler_config.json") == read(streaming / "scheduler" / "scheduler_config.json")


def test_the_command_of_its_card_runs(streaming: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (export(streaming, tmp_path / "my student") / "README.md").read_text()
    program, *words = shlex.split(card.split("```bash\n")[1].splitlines()[0])
    words[words.index("--prompt") + 1] = "a cat"  # the toy's texts are short
    monkeypatch.chdir(tmp_path)
    assert (program, main(words)) == ("fastvideo", 0)
    assert (tmp_path / "video.mp4").is_file()


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ({}, ("--to", "fastvideo"), "no streaming student"),
        ({"streaming": STREAMING | {"chunk": 4, "window": 4, "sink": 0}}, ("--to", "fastvideo"), "3 at most"),
        ({"streaming": STREAMING, "ladder": [1.0, 0.8, 0.6, 0.4, 0.2]}, ("--to", "fastvideo"), "5 calls"),
        ({"streaming": STREAMING, "sampler": "euler"}, ("--to", "self-forcing"), "'euler' has no counterpart"),
        ({"streaming": STREAMING | {"first_ladder": [1.0, 0.5]}}, ("--to", "self-forcing"), "1.0000 0.5000"),
        ({"streaming": STREAMING}, ("--to", "self-forcing", "--slim"), "--slim"),
        ({"streaming": STREAMING}, ("--to", "comfy"), "--to fastvideo or self-forcing"),
        ({"streaming": {"chunk": 0}}, ("--to", "fastvideo"), "at least 1 latent frame"),
    ],
)
def test_what_other_programs_cannot_sample_is_refused(
    student: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: dict[str, Any],
    flags: tuple[str, ...],
    said: str,
) -> None:
    out = tmp_path / "out"
    export(student(**recipe), out, *flags, code=2)
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
