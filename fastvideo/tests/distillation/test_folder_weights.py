"""Pipeline folders whose weights are not those of their configs are refused by name, however they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.diffusers.folder import WHOLE
from fastvideo.distillation.engine.placement import read_whole
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import FAMILIES, LATER, experts_folder, wan_config

Weights = dict[str, Tensor]
OVER_DIFFUSERS = [
    pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in FAMILIES if name != "analytic"
]


def change(part: Path, edit: Callable[[Weights], object]) -> None:
    """Edit the weights of a component, and leave its config."""
    weights = load_file(part / WHOLE)
    edit(weights)
    save_file(weights, part / WHOLE, metadata={"format": "pt"})


def refusals(family: Any, part: Path) -> list[str]:
    """What is said on every way to a network: whole, on the host, and by its shards."""
    said = []
    for read in (family.folder.load_network, lambda: read_whole(family.folder, None), lambda: shards(family)):
        with pytest.raises(UserError) as refused:
            read()
        said.append(str(refused.value))
        assert str(part) in said[-1]
        assert "config.json" in said[-1]
    return said


def shards(family: Any) -> dict[str, Any]:
    return dict(of_folder(family.folder).files(None))


@pytest.mark.parametrize("name", OVER_DIFFUSERS)
def test_weights_that_lack_one_or_have_one_more_are_refused(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name].make(tmp_path)
    part = Path(family.config.path) / family.folder.parts[0]
    whole, network = shards(family), family.folder.load_network()
    assert {key for key, _ in network.named_parameters()} <= whole.keys()
    first = min(key for key, _ in network.named_parameters())
    (network_class,) = {type(network).__name__}
    change(part, lambda weights: weights.pop(first))
    for said in refusals(family, part):
        assert f"no {network_class} of this size: 1 missing ({first}); " in said
    change(part, lambda weights: weights.update(foreign=torch.zeros(2)))
    for said in refusals(family, part):
        assert f"1 missing ({first}), 1 unknown (foreign); " in said


@pytest.mark.parametrize("name", ["wan", "cogvideox", "qwen_image"])
def test_a_config_of_fewer_layers_trains_no_half_of_a_network(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name].make(tmp_path)
    part = Path(family.config.path) / family.folder.parts[0]
    config = json.loads((part / "config.json").read_text())
    assert config["num_layers"] == 2
    (part / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    for said in refusals(family, part):
        assert "unknown (" in said
        assert "blocks.1." in said


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["wan"].make(tmp_path)
    part = Path(family.config.path) / "transformer"
    change(part, lambda weights: weights.update({"proj_out.bias": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"transformer: 1 tensors .* proj_out\.bias with \(2,\) where \(16,\)"):
        shards(family)
    with pytest.raises(UserError, match=r"cannot load 'transformer' .* proj_out\.bias expected shape"):
        family.folder.load_network()


def test_the_second_expert_is_checked_too(tmp_path: Path) -> None:
    folder = experts_folder(tmp_path)
    family = FAMILIES["wan"].make(tmp_path)
    family = type(family)(wan_config(folder))
    change(folder / "transformer_2", lambda weights: weights.pop("proj_out.bias"))
    for said in refusals(family, folder / "transformer_2"):
        assert "1 missing (proj_out.bias); " in said


def test_what_diffusers_passes_over_is_no_reason(tmp_path: Path) -> None:
    """Wan's published image models hold a norm that the class has not."""
    assert WanTransformer3DModel._keys_to_ignore_on_load_unexpected == ["norm_added_q"]
    family = FAMILIES["wan"].make(tmp_path)
    extra = {"blocks.0.attn2.norm_added_q.weight": torch.zeros(2)}
    change(Path(family.config.path) / "transformer", lambda weights: weights.update(extra))
    read = [family.folder.load_network(), read_whole(family.folder, None)]
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in read), strict=True))


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sdxl", "qwen_image"])
def test_an_autoencoder_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name].make(tmp_path)
    part = Path(family.config.path) / "vae"
    first = min(load_file(part / WHOLE))
    change(part, lambda weights: weights.pop(first))
    with pytest.raises(UserError) as refused:
        family.codec.encode(torch.zeros(1, 3, family.config.num_frames, 16, 32))
    assert f"{part} is no {family.codec.pipeline.spec.vae} of this size: 1 missing ({first}); " in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["audio_vae", "vocoder", "connectors"])
def test_the_parts_of_sound_are_checked(part: str, tmp_path: Path) -> None:
    family: Any = FAMILIES["ltx2"].make(tmp_path)
    folder = Path(family.config.path) / part
    first = min(load_file(folder / WHOLE))
    change(folder, lambda weights: weights.pop(first))
    with pytest.raises(UserError, match="of this size: 1 missing"):
        family.conditioner.encode_prompts(["a"]) if part == "connectors" else getattr(family.codec, part)
