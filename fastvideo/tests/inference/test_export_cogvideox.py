"""An exported CogVideoX student: stock diffusers makes our video of it, and it is still a CogVideoX model to us."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from fastvideo.cli import main
from fastvideo.data.model import SIZES
from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import load_exporter, run_schema
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.samplers import generate
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tests.distillation.tiny import cogvideox_config, cogvideox_folder
from fastvideo.tests.inference.exporting import PROMPTS, export
from fastvideo.training.run import run

ONE_LEVEL = 1 / 255


def student(folder: Path, sampler: str, times: list[float] | None = None) -> Path:
    """A toy student on the times that stock diffusers yields for it, or on the given ones."""
    config = cogvideox_config(cogvideox_folder(folder))
    adapter = CogVideoXAdapter(config)
    ladder = times or list(load_exporter(adapter.config).stock_sampler([1.0, 0.75, 0.5, 0.25], sampler).times)
    recipe = {"ladder": ladder, "sampler": sampler, "guidance": 1.0, "model": config.model_dump()}
    adapter.folder.save(folder / "student", adapter.folder.load_network(), recipe)
    return folder / "student"


def noise_of(model: LoadedModel) -> Tensor:
    return normal((len(PROMPTS), *model.adapter.codec.latent_shape), seeded(6))


def stock(folder: Path) -> np.ndarray:
    """Videos ``[B, T, H, W, 3]`` in [0, 1]; the pipeline's latents have frames before channels."""
    model = load_model(str(folder))
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {name: getattr(model.adapter.config, name) for name in SIZES}
    torch.manual_seed(7)
    return pipeline(
        PROMPTS, num_inference_steps=len(model.recipe["ladder"]), guidance_scale=1.0,
        latents=noise_of(model).transpose(1, 2),
        output_type="np", **sizes,
    ).frames  # fmt: skip


def ours(folder: Path, steps: int | None = None) -> np.ndarray:
    """The same by our own sampler, from the same noise and the same draws."""

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.transpose(1, 2).shape).transpose(1, 2)

    model = load_model(str(folder))
    spec = model.sampler(steps)
    velocity = partial(
        model.adapter.velocity, model.network, condition=model.adapter.conditioner.encode_prompts(PROMPTS)
    )
    torch.manual_seed(7)
    latents = generate(spec.kind, velocity, noise_of(model), spec.times, draw)
    return (model.adapter.codec.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize(("steps", "sampler"), [(4, "renoise"), (1, "renoise"), (4, "euler")])
def test_stock_diffusers_makes_our_video(tmp_path: Path, steps: int, sampler: str) -> None:
    source = student(tmp_path, sampler)
    out = export(source, tmp_path / "out", "--steps", str(steps))
    expected, theirs = ours(source, steps), stock(out)
    assert expected.shape == theirs.shape
    assert expected.std() > 0.01, "there is something to compare"
    assert np.abs(expected - theirs).max() <= 2 * ONE_LEVEL
    assert np.abs(expected - ours(out)).max() <= 1e-5, "the exported scheduler still says which noise levels it has"


def test_a_ladder_off_the_grid_of_timesteps_comes_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(student(tmp_path, "renoise", [1.0, 0.75, 0.5, 0.25]), tmp_path / "out")
    assert "no stock scheduler yields this ladder. Trained: 1.0000 0.7500 0.5000 0.2500" in capsys.readouterr().err


def test_only_names_that_its_programs_know_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAT's names are not known here: diffusers' would be written in their place."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    values = {
        "distill_model": "cogvideox",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": cogvideox_config(cogvideox_folder(tmp_path)).model_dump(),
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 2}},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 2}},
        },
        "method": {},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 1},
    }
    run(validate(run_schema("cogvideox", "dmd2"), values, "test"))
    for layout in ("lora-comfy", "lora-kohya", "lora-lightx2v"):
        assert main(["export", str(tmp_path / "run"), "--to", layout, "--out", str(tmp_path / "out")]) == 2
        assert f"{layout}: cogvideox has the layouts lora-diffusers, lora-peft" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--to", "comfy", "--out", str(tmp_path / "out")]) == 2
    assert "is not written under its authors' names: --to diffusers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "run"), "--to", "lora-diffusers", "--out", str(tmp_path / "out")]) == 0
