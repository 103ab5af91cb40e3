"""A student's adapter alone, under the names that other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import UserError
from fastvideo.inference.export import run_export
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.training.run import run

BLOCKS = ("self_attn", "cross_attn")
GOLDEN = [
    f"diffusion_model.blocks.{block}.{attention}.{layer}.lora_{ab}.weight"
    for block in (0, 1) for attention in BLOCKS for layer in "koqv" for ab in "AB"
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with an adapter of alpha twice its rank, and a checkpoint."""
    root = tmp_path_factory.mktemp("lora")
    prompts = root / "prompts.txt"
    prompts.write_text("a green seven\nred three\n" * 4)
    values: dict[str, Any] = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "device": "cpu",
        "model": {"path": str(wan_folder(root)), "height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8},
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 2, "alpha": 4}},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 2}},
        },
        "ladder": {"times": [1.0, 0.5]},
        "method": {"generator_update_interval": 1, "student_learning_rate": 1e-2, "critic_learning_rate": 1e-2},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 3},
        "checkpoint": {"every": 3},
    }
    run(validate(run_schema("wan", "dmd2"), values, "test"))
    return root / "run"


def export(source: Path, out: Path, to: str, **options: Any) -> Path:
    run_export(str(source), out, to=to, **options)
    return out


def forward(network: Any, adapter: Any) -> torch.Tensor:
    x_t = torch.randn((1, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return adapter.velocity(
            network, x_t, torch.tensor([0.7]), adapter.conditioner.encode_prompts(["a green seven"])
        )


def test_stock_diffusers_loads_the_adapter_and_it_equals_the_merged_student(trained: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    out = export(trained, tmp_path / "out", "lora-diffusers")
    student = load_model(str(trained / "student"))
    recipe = json.loads((trained / "student" / "recipe.json").read_text())
    pipeline = WanPipeline.from_pretrained(recipe["model"]["path"])
    before = forward(pipeline.transformer, student.adapter)
    pipeline.load_lora_weights(str(out))
    found, expected = forward(pipeline.transformer, student.adapter), forward(student.network, student.adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 1e-3


def test_the_comfyui_layout_has_the_authors_names_and_diffusers_reads_it_back(trained: Path, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    plain = load_file(export(trained, tmp_path / "a", "lora-diffusers") / "pytorch_lora_weights.safetensors")
    comfy = load_file(export(trained, tmp_path / "b", "lora-comfy") / "comfyui_lora.safetensors")
    assert sorted(comfy) == sorted(GOLDEN)
    back = _convert_non_diffusers_wan_lora_to_diffusers(dict(comfy))
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], plain[name]) for name in plain)


def test_a_checkpoint_holds_the_adapter_alone_and_exports_as_the_result_does(trained: Path, tmp_path: Path) -> None:
    (trained / "student").rename(trained / "aside")
    try:
        adapter = export(trained, tmp_path / "a", "lora-diffusers") / "pytorch_lora_weights.safetensors"
        merged = load_model(str(export(trained, tmp_path / "b", "diffusers")))
    finally:
        (trained / "aside").rename(trained / "student")
    student = load_model(str(trained / "student"))
    expected = load_file(trained / "student" / "pytorch_lora_weights.safetensors")
    found = load_file(adapter)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    torch.testing.assert_close(
        forward(merged.network, student.adapter), forward(student.network, student.adapter), rtol=1e-5, atol=1e-6
    )
    index = json.loads((trained / "checkpoints" / "step-3" / "tensors.json").read_text())
    assert not [name for name in index if "::network::" in name and ".lora_" not in name]


def test_a_student_that_was_trained_whole_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter"):
        export(wan_folder(tmp_path), tmp_path / "out", "lora-diffusers")
    assert main(["export", str(wan_folder(tmp_path)), "--to", "lora-diffuser", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_the_folder_names_its_base_and_loads_as_its_readme_says(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of README.md run as they are, and sample with the student's own noise levels."""
    run_export(str(trained), tmp_path / "out", to="lora-diffusers")
    text = (tmp_path / "out" / "README.md").read_text()
    base = Path(json.loads((trained / "student" / "recipe.json").read_text())["model"]["path"])
    assert f"over `{base.name}`" in text
    assert str(base.parent) not in text  # a path of this machine helps nobody
    assert "num_frames=5, max_sequence_length=8)" in text
    (tmp_path / base.name).symlink_to(base)
    code = text.split("```python\n")[1].split("```")[0].rpartition("video = ")[0]
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)  # the lines of the page
    names["pipe"].scheduler.set_timesteps(2)
    assert [float(time) for time in names["pipe"].scheduler.timesteps] == pytest.approx([1000, 500], abs=1)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").glob("*.*")} == {"0o644"}
