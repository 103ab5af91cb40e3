"""Networks in one file, in the layout in which their authors publish them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvideo.cli import main
from fastvideo.distillation.adapters.diffusers.single_file import is_quantised, load_tensors
from fastvideo.distillation.adapters.export.stable_diffusion import original_blocks
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import FAMILIES, made_family

ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Modules of the tiny UNet in the code of Stability (two levels of one block each, attention in the lower one)."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
LTX = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single.", "norm_q": "q_norm", "norm_k": "k_norm"}


def unet_name(name: str) -> str:
    (module,) = (own for own in ORIGINAL if name.startswith(f"{own}."))
    rest = name.removeprefix(module)
    for own, original in RESNET.items() if ".resnets." in module else ():
        rest = rest.replace(f".{own}.", f".{original}.")
    return ORIGINAL[module] + rest


def ltx_name(name: str) -> str:
    for own, original in LTX.items():
        name = name.replace(own, original)
    return name


def checkpoint(network: Any, name: Any) -> dict[str, Tensor]:
    """A whole one: network, VAE and text encoder, whose table of positions is of whole numbers."""
    own = {f"model.diffusion_model.{name(key)}": value.contiguous() for key, value in network.state_dict().items()}
    positions = {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {**own, **positions, "first_stage_model.encoder.conv_in.bias": torch.zeros(2)}


@pytest.mark.parametrize(("family", "name"), [("sdxl", unet_name), ("sd15", unet_name), ("ltx", ltx_name)])
def test_a_whole_checkpoint_in_the_authors_layout_is_the_network(
    family: str, name: Any, tiny_wan: Path, tmp_path: Path
) -> None:
    made = made_family(family, tiny_wan.parent)
    network = made.folder.load_network()
    whole = checkpoint(network, name)
    alone = {key.removeprefix("model.diffusion_"): value for key, value in whole.items() if "diffusion_model" in key}
    files = [tmp_path / "whole.safetensors", tmp_path / "comfy.safetensors", tmp_path / "whole.ckpt"]
    save_file(whole, files[0])
    save_file({f"diffusion_{key}": value for key, value in alone.items()}, files[1])
    torch.save({"epoch": 3, "state_dict": whole}, files[2])
    for file in files:
        found = made.folder.load_network(str(file)).state_dict()
        assert all(torch.equal(found[key], value) for key, value in network.state_dict().items()), file


class Callback:
    """Key of a callback's state in a checkpoint of Lightning."""


def test_a_checkpoint_with_python_objects_says_to_save_it_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3, "callbacks": {"a": {"best": 0.5}}}, file)
    assert set(load_tensors(file)[0]) == {"a"}
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": {Callback: {}}}, file)
    with pytest.raises(UserError, match=r"holds Python objects beside tensors: save the weights as \.safetensors$"):
        load_tensors(file)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors of the calls inside held at once, a file's own among them from their first use."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._seen = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, found)):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {key: held for key, held in self._seen.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return found


def in_fp8(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A scaled fp8 file of weights, and the float32 products of its matrices."""
    file, products = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in weights.items():
        file[name] = value.contiguous()
        if value.ndim > 1 and name.endswith(".weight"):
            scale = value.abs().max() / 448
            file[name] = (value / scale).to(torch.float8_e4m3fn)
            file[name.replace(".weight", ".scale_weight")] = scale
            products[name] = file[name].float() * scale
    return file, products


@pytest.mark.parametrize(("name", "named"), [("wan", str), ("sdxl", unet_name)])
def test_scaled_fp8_is_held_once_and_rounded_once(name: str, named: Any, tmp_path: Path) -> None:
    family = FAMILIES[name].make(tmp_path)
    file, products = in_fp8({named(key): value for key, value in family.folder.load_network().state_dict().items()})
    save_file(file, tmp_path / "fp8.safetensors")
    with LiveBytes() as live:
        network = family.folder.load_network(str(tmp_path / "fp8.safetensors"), torch.bfloat16)
    state = network.state_dict()
    size = sum(value.nbytes for value in [*network.parameters(), *network.buffers()])
    assert size < live.peak < size + 2 * max(value.nbytes for value in products.values()), (
        "beside it one float32 matrix"
    )
    kept = {key for key, value in state.items() if value.dtype == torch.float32 and named(key) in products}
    assert bool(kept) == (name == "wan"), "its time embedding stays float32"
    for key, value in state.items():
        assert torch.equal(value, products.get(named(key), file[named(key)]).to(value.dtype)), key


def test_a_text_encoder_in_fp8_makes_no_network_quantised(tmp_path: Path) -> None:
    few = torch.zeros(2).to(torch.float8_e4m3fn)
    network, file = {"model.diffusion_model.out.2.bias": torch.zeros(2)}, str(tmp_path / "whole.safetensors")
    for tensors, quantised in [
        (network | {"text_encoders.t5xxl.transformer.shared.weight": few}, False),
        (network | {"model.diffusion_model.out.2.weight": few}, True),
        ({"out.2.weight": few}, True),
    ]:
        save_file(tensors, file)
        assert is_quantised(file) is quantised


def test_a_file_that_predicts_v_is_told_apart(tiny_wan: Path, tmp_path: Path) -> None:
    made, file = made_family("sdxl", tiny_wan.parent), tmp_path / "a.safetensors"
    whole = checkpoint(made.folder.load_network(), unet_name)
    save_file(whole | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    scheduler = EulerDiscreteScheduler.from_pretrained(made.config.path, subfolder="scheduler")
    options = 'prediction_type="v_prediction", rescale_betas_zero_snr=True'
    for step, change in enumerate(({}, {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True})):
        folder = shutil.copytree(made.config.path, tmp_path / f"{step}")
        scheduler.register_to_config(**change)
        scheduler.save_pretrained(folder / "scheduler")
        family = made_family("sdxl", tiny_wan.parent, path=str(folder))
        if step < 2:
            message = rf"{file} holds v_pred and ztsnr, .*scheduler of '{folder}' .*register_to_config\({options}\)"
            with pytest.raises(UserError, match=message):
                family.folder.load_network(str(file))
    found = family.folder.load_network(str(file)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in made.folder.load_network().state_dict().items())


def test_levels_of_different_depths_have_no_names_of_stability() -> None:
    levels = {"layers_per_block": [1, 2], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with pytest.raises(UserError, match=r"layers_per_block \[1, 2\]: .*; only diffusers' names fit this network"):
        original_blocks(levels)
    assert original_blocks(levels | {"layers_per_block": 1})["down_blocks.1.resnets.0"] == "input_blocks.3.0"


def test_names_of_layers_are_those_of_the_file(tiny_wan: Path) -> None:
    made = made_family("sdxl", tiny_wan.parent)
    original = load_exporter(made.config).original_name
    names = [*made.folder.load_network().state_dict()]
    assert [original(name) for name in names] == [unet_name(name) for name in names]
    with pytest.raises(UserError, match=r"down_blocks\.7\.x: Stability's code has no such layer"):
        original("down_blocks.7.x")


def test_a_tensor_that_the_converter_of_unets_passes_over_is_named(tiny_wan: Path, tmp_path: Path) -> None:
    made, file = made_family("sd15", tiny_wan.parent), tmp_path / "a.safetensors"
    tensors = checkpoint(made.folder.load_network(), unet_name)
    save_file(tensors | {"model.diffusion_model.label_emb.0.0.bias": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"no UNet2DConditionModel of this size: 1 unknown \(label_emb\.0\.0\.bias\)"):
        made.folder.load_network(str(file))
    save_file({key: value for key, value in tensors.items() if "time_embed" not in key}, file)
    with pytest.raises(UserError, match=r"of this size: 4 missing \(time_embedding\.linear_1\.bias, "):
        made.folder.load_network(str(file))


def test_a_file_of_something_else_says_to_take_a_folder(tiny_wan: Path, tmp_path: Path) -> None:
    """Where diffusers has a converter of the class and where it has none."""
    file = tmp_path / "other.safetensors"
    save_file({"blocks.0.scale": torch.zeros(1)}, file)
    for family, message in {
        "kandinsky5": "none of its names is this network's, .* give a pipeline folder of diffusers",
        "sdxl": "diffusers cannot convert its tensors .*; it holds another model, .*: give a pipeline folder",
    }.items():
        with pytest.raises(UserError, match=message):
            made_family(family, tiny_wan.parent).folder.load_network(str(file))


@pytest.mark.slow
def test_fastvideo_merge_makes_a_folder_of_a_whole_checkpoint(tiny_wan: Path, tmp_path: Path) -> None:
    made = made_family("sdxl", tiny_wan.parent)
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    save_file(checkpoint(made.folder.load_network(), unet_name), file)
    assert main(["merge", made.config.path, "--network", str(file), "--out", str(out)]) == 0
    found = made.folder.load_network(str(out)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in made.folder.load_network().state_dict().items())
