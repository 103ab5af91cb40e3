"""An exported student, sampled by stock diffusers, makes our video; and nothing half-written is ever left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastvideo.data.model import SIZES
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.checkpoint.manifest import complete_checkpoints
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.samplers import generate
from fastvideo.inference.loading import LoadedModel, load_model, open_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.distillation.tiny_images import i2v_config, ti2v_config
from fastvideo.tests.inference.exporting import PROMPTS, export

ONE_LEVEL = 1 / 255
SHIFTED = [1.0, 0.9375, 0.8333333, 0.625]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def refusal(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *flags: str) -> str:
    """What is said when an export is refused; nothing may be left beside ``out``."""
    before = set(out.parent.iterdir())
    export(source, out, *flags, code=2)
    assert set(out.parent.iterdir()) == before, "nothing half-written"
    return capsys.readouterr().err


def noise_of(folder: Path) -> Tensor:
    return normal((len(PROMPTS), *open_model(str(folder)).adapter.codec.latent_shape), seeded(6))


def stock(folder: Path, steps: int, scheduler: Any = None) -> np.ndarray:
    """Videos ``[B, T, H, W, 3]`` in [0, 1] by the stock pipeline of a folder, with its scheduler or another."""
    return sampled(WanPipeline.from_pretrained(folder), steps, noise_of(folder), scheduler)


def sampled(pipeline: Any, steps: int, noise: Tensor, scheduler: Any = None) -> np.ndarray:
    """The same by a loaded pipeline; its scheduler draws from the global generator."""
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    torch.manual_seed(7)
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="np", **size
    ).frames


def ours(folder: Path, steps: int | None = None) -> np.ndarray:
    """The same by our own sampler, from the same noise and the same draws."""
    return sampled_by_us(load_model(str(folder)), steps)


def sampled_by_us(model: LoadedModel, steps: int | None = None) -> np.ndarray:
    """The same by a loaded model."""
    spec = model.sampler(steps)
    velocity = partial(
        model.adapter.velocity, model.network, condition=model.adapter.conditioner.encode_prompts(PROMPTS)
    )
    torch.manual_seed(7)
    latents = generate(spec.kind, velocity, noise_of(Path(model.source)), spec.times, lambda x: torch.randn(x.shape))
    return (model.adapter.codec.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape == (2, 5, 16, 32, 3)
    return float(np.abs(first - second).max())


def test_a_flow_map_is_exported_with_its_head_and_a_warning(student: Callable[..., Path], tmp_path: Path) -> None:
    given = student(sampler="flow_map")
    model = load_model(str(given))
    model.adapter.folder.add_flow_map(model.network)
    torch.nn.init.normal_(model.network.get_parameter("flow_map_head.last.weight"), std=0.3)
    model.adapter.folder.save(tmp_path / "mapped", model.network, dict(model.recipe))
    folder = export(tmp_path / "mapped", tmp_path / "out")
    exported = load_model(str(folder))
    found = sampled_by_us(exported)
    assert difference(found, ours(tmp_path / "mapped")) == 0.0
    assert difference(sampled_by_us(exported, 1), found) > ONE_LEVEL
    card = (folder / "README.md").read_text()
    assert "flow map" in card
    assert "`fastvideo generate`" in card
    assert stock(folder, 2).shape == (2, 5, 16, 32, 3), "stock diffusers loads it, without the head"
    back = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert back["_class_name"] == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("steps", "ladder", "sampler"),
    [
        (4, [1.0, 0.75, 0.5, 0.25], "renoise"),
        (4, SHIFTED, "renoise"),
        (4, SHIFTED, "euler"),
        (1, SHIFTED, "renoise"),
    ],
)
def test_stock_diffusers_makes_our_video(
    student: Callable[..., Path], tmp_path: Path, steps: int, ladder: list[float], sampler: str
) -> None:
    source = student(ladder=ladder, sampler=sampler)
    out = export(source, tmp_path / "out", "--steps", str(steps))
    expected = ours(source, steps)
    assert difference(stock(out, steps), expected) <= 2 * ONE_LEVEL
    assert difference(ours(out), expected) == 0.0, "our own sampler makes the same of the export"


def test_the_figure_would_notice_another_sampler_or_ladder(student: Callable[..., Path], tmp_path: Path) -> None:
    source = student(ladder=SHIFTED)
    out, expected = export(source, tmp_path / "out"), ours(source)
    pipeline, noise = WanPipeline.from_pretrained(out), noise_of(out)
    config = FlowMatchEulerDiscreteScheduler.load_config(out / "scheduler")
    for change in ({"stochastic_sampling": False}, {"shift": 1.0}, {"shift_terminal": None}):
        other = FlowMatchEulerDiscreteScheduler.from_config(config, **change)
        assert difference(sampled(pipeline, 4, noise, other), expected) > 2 * ONE_LEVEL, change


def test_one_call_of_a_student_for_four_by_the_line_in_its_card(distilled: Path, tmp_path: Path) -> None:
    out = export(distilled, tmp_path / "out")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    assert "from_config(pipe.scheduler.config, shift_terminal=None)" in (out / "README.md").read_text()
    changed = type(scheduler).from_config(scheduler.config, shift_terminal=None)
    assert difference(stock(out, 1, changed), ours(out, 1)) <= 2 * ONE_LEVEL


@pytest.mark.parametrize("way", ["i2v", "ti2v"])
def test_stock_diffusers_goes_on_from_an_image_as_we_do(
    way: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """An image beside the noise (Wan 2.1 I2V), and a first frame that stays clean (TI2V-5B)."""
    root = tmp_path_factory.getbasetemp()
    config = i2v_config(root) if way == "i2v" else ti2v_config(root, given_frames=1)
    adapter = WanFamily(config)
    recipe = {"ladder": SHIFTED, "sampler": "renoise", "guidance": 1.0, "model": config.model_dump()}
    adapter.folder.save(tmp_path / "student", adapter.folder.load_network(), recipe)
    out = export(tmp_path / "student", tmp_path / "out")
    assert "from diffusers import WanImageToVideoPipeline" in (out / "README.md").read_text()
    image = (normal((3, config.height, config.width), seeded(5)) * 60 + 128).clamp(0, 255).byte()
    noise, sizes = noise_of(out), {name: getattr(config, name) for name in SIZES}
    pipeline = WanImageToVideoPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "latents": noise, "output_type": "latent"}
    expected = pipeline(picture, PROMPTS, **options, **sizes).frames
    model = load_model(str(out))
    frames = (image / 127.5 - 1)[None, :, None].expand(len(PROMPTS), -1, -1, -1, -1)
    condition = model.adapter.conditioner.encode_prompts(PROMPTS) | model.adapter.conditioner.condition_on(frames)
    role = RoleHandle("student", model.adapter, model.network)
    torch.manual_seed(7)
    velocity = partial(role.velocity, condition=condition)
    found = generate("renoise", velocity, noise, SHIFTED, lambda x: torch.randn(x.shape))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def checkpointed(run_folder: Path, part: str) -> dict[str, Tensor]:
    """One kind of the student's weights in the newest checkpoint, read without any of our readers."""
    tensors = load_file(complete_checkpoints(run_folder / "checkpoints")[-1] / "process-0.safetensors")
    prefix = f"student::{part}::"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize(("flags", "part"), [((), "ema"), (("--ema",), "ema"), (("--live",), "network")])
def test_exported_weights_are_the_runs_bit_for_bit(distilled: Path, tmp_path: Path, flags: tuple, part: str) -> None:
    out = export(distilled, tmp_path / "out", *flags)
    loaded = WanPipeline.from_pretrained(out).transformer.state_dict()
    expected, other = checkpointed(distilled, part), checkpointed(distilled, {"ema": "network", "network": "ema"}[part])
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert any(not torch.equal(loaded[name], other[name]) for name in expected)
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["weights"], recipe["steps"]) == ("ema" if part == "ema" else "live", 2)


def test_a_run_that_never_finished_is_exported_from_its_newest_checkpoint(distilled: Path, tmp_path: Path) -> None:
    whole = export(distilled, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(distilled, cut, ignore=shutil.ignore_patterns("student"))
    out = export(cut, tmp_path / "out")
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert json.loads((out / "recipe.json").read_text()) == json.loads((whole / "recipe.json").read_text())


def test_checkpoints_that_go_on_after_the_result_are_newer(distilled: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(distilled, again)
    recipe = again / "student" / "recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"steps": 1}))
    weights = again / "student" / WEIGHTS
    weights.write_bytes((wan_folder(distilled.parent) / WEIGHTS).read_bytes())
    loaded = load_file(export(again, tmp_path / "out") / WEIGHTS)
    expected = checkpointed(again, "ema")
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_half_precision_halves_the_file_and_keeps_what_diffusers_keeps(distilled: Path, tmp_path: Path) -> None:
    out = export(distilled, tmp_path / "out", "--dtype", "bfloat16")
    full = checkpointed(distilled, "ema")
    saved = load_file(out / WEIGHTS)
    assert saved["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    loaded = WanPipeline.from_pretrained(out, torch_dtype=torch.bfloat16).transformer.state_dict()
    direct = WanPipeline.from_pretrained(distilled / "student", torch_dtype=torch.bfloat16).transformer.state_dict()
    for name, weight in direct.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight), name
    assert torch.equal(
        saved["condition_embedder.time_embedder.linear_1.weight"],
        full["condition_embedder.time_embedder.linear_1.weight"],
    )


def test_a_teacher_keeps_its_scheduler_unless_steps_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    out = export(tiny, tmp_path / "out")
    assert (out / "scheduler/scheduler_config.json").read_text() == (
        tiny / "scheduler/scheduler_config.json"
    ).read_text()
    made = export(tiny, tmp_path / "made", "--steps", "6")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(made / "scheduler")
    scheduler.set_timesteps(6)
    expected = load_model(str(tiny)).adapter.folder.teacher_times(6)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(expected), rtol=0, atol=1e-6)
    spec = load_model(str(made)).sampler()
    assert (spec.times, spec.kind, spec.guidance) == (expected, "euler", 2.0), "we sample it there too"


@pytest.fixture
def tiny(distilled: Path, tmp_path: Path) -> Path:
    """A teacher: a model folder whose recipe has no ladder."""
    shutil.copytree(distilled / "student", tmp_path / "teacher")
    recipe = json.loads((tmp_path / "teacher/recipe.json").read_text())
    kept = {"model": recipe["model"], "guidance": 2.0}
    (tmp_path / "teacher/recipe.json").write_text(json.dumps(kept))
    return tmp_path / "teacher"


def test_what_is_wrong_is_said_and_nothing_is_written(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "did you mean 'diffusers'" in refusal(capsys, distilled, out, "--to", "difusers")
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere", out)
    assert "runs with --steps 4 or --steps 1, not 3" in refusal(capsys, distilled, out, "--steps", "3")
    assert "holds ema weights alone" in refusal(capsys, distilled / "student", out, "--live")
    assert "must not contain each other" in refusal(capsys, distilled / "student", distilled / "student" / "out")
    assert "is no run" in refusal(capsys, tmp_path, out)


def test_a_run_without_checkpoints_has_only_what_its_result_holds(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(distilled, bare, ignore=shutil.ignore_patterns("checkpoints"))
    assert "holds no live weights; it holds: ema (step 2)" in refusal(capsys, bare, tmp_path / "out", "--live")
    export(bare, tmp_path / "out")
    shutil.rmtree(bare / "student")
    assert "it holds: none" in refusal(capsys, bare, tmp_path / "out2")


def test_a_damaged_checkpoint_is_named(distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(distilled, damaged)
    with (damaged / "checkpoints/step-2/process-0.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    said = refusal(capsys, damaged, tmp_path / "out", "--live")
    assert "process-0.safetensors is damaged" in said


def test_an_output_folder_in_use_is_left_alone(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "is in use" in refusal(capsys, distilled, out)
    assert "is no earlier export" in refusal(capsys, distilled, out, "--overwrite")
    assert (out / "precious.txt").read_text() == "mine"
    earlier = export(distilled, tmp_path / "earlier")
    assert "is in use" in refusal(capsys, distilled, earlier)
    export(distilled, earlier, "--overwrite", "--steps", "1")
    assert json.loads((earlier / "recipe.json").read_text())["ladder"] == [1.0]
