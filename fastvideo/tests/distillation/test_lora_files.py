"""LoRA files of other programs: read under every name, merged, and used as a start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.export.lora import LAYOUTS, read_lora
from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.engine.lora import AdapterSwitch, add_adapter, merge_file, parameter_shapes, start_adapter
from fastvideo.distillation.lora_file import LoRAFile
from fastvideo.distillation.registry import load_exporter
from fastvideo.errors import UserError
from fastvideo.tests.distillation.tiny import FAMILIES, made_family

RANK = 3
TARGETS = {
    "wan": ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    "cogvideox": ("to_q", "to_k", "to_v"),
}


class Subject:
    """A family's network with the layers that an adapter changes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.adapter: DistillAdapter[Any] = FAMILIES[name].make(folder)
        self.network = self.adapter.folder.load_network()
        self.shapes = parameter_shapes(self.network)
        self.exporter = load_exporter(self.adapter.config)
        self.original = self.exporter.original_name
        ends = tuple(f".{target}.weight" for target in TARGETS[name])
        self.layers = [key.removesuffix(".weight") for key in self.shapes if key.endswith(ends)]

    def factors(self, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {layer: self.shapes[f"{layer}.weight"] for layer in self.layers}
        return {
            layer: (torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator))
            for layer, shape in shapes.items()
        }

    def read(self, path: Path) -> LoRAFile:
        return read_lora(path, self.shapes, self.exporter)


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("wan", tmp_path_factory.mktemp("wan"))


def written(subject: Subject, layout: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    own = LAYOUTS[layout]
    save_file(own.write(subject.factors(), subject.original, "transformer"), folder / own.file)
    return folder / own.file


def same(found: Mapping[str, tuple[Tensor, Tensor]], expected: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(a, b) for key in found for a, b in zip(found[key], expected[key], strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_is_exact(subject: Subject, layout: str, tmp_path: Path) -> None:
    assert same(subject.read(written(subject, layout, tmp_path)).factors, subject.factors())


@pytest.mark.parametrize("layout", ["comfy", "lightx2v", "kohya"])
def test_diffusers_converters_are_the_inverse(wan: Subject, layout: str, tmp_path: Path) -> None:
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    found = WanLoraLoaderMixin.lora_state_dict(load_file(written(wan, layout, tmp_path)))
    expected = LAYOUTS["diffusers"].write(wan.factors(), wan.original, "transformer")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alpha_is_folded(subject: Subject, layout: str, tmp_path: Path) -> None:
    """An alpha of four times the rank, in whichever of the three places a program writes it."""
    own, file = LAYOUTS[layout], written(subject, layout, tmp_path)
    tensors, metadata = load_file(file), {}
    if layout == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 4 * RANK}))
    elif layout == "diffusers":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 4 * RANK})}
    else:
        layers = {name.removesuffix(own.down) for name in tensors if name.endswith(own.down)}
        tensors |= {f"{layer}.alpha": torch.tensor(4 * RANK) for layer in layers}
    save_file(tensors, file, metadata=metadata)
    found, plain = subject.read(tmp_path), subject.factors()
    assert all(torch.equal(up, 4 * plain[layer][1]) for layer, (_, up) in found.factors.items())


def test_rank_stabilised_alpha(wan: Subject, tmp_path: Path) -> None:
    file = written(wan, "peft", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2, "use_rslora": True}))
    layer = wan.layers[0]
    torch.testing.assert_close(wan.read(file).factors[layer][1], wan.factors()[layer][1] * (2 / RANK**0.5))


def test_alphas_of_some_layers_are_patterns(wan: Subject, tmp_path: Path) -> None:
    """As peft matches them: regular expressions over the end of a layer's name, the first that fits."""
    file = written(wan, "peft", tmp_path)
    config = {"r": RANK, "lora_alpha": RANK, "alpha_pattern": {r"blocks\.0\..*\.to_q": 2 * RANK, "to_q": 3 * RANK}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    found, plain = wan.read(file).factors, wan.factors()
    for layer, times in {"blocks.0.attn1.to_q": 2, "blocks.1.attn1.to_q": 3, "blocks.0.attn1.to_k": 1}.items():
        torch.testing.assert_close(found[layer][1], times * plain[layer][1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json: not JSON"),
        ("[1]", "adapter_config.json: an object is expected, got a list"),
        ('{"lora_alpha": "auto"}', "lora_alpha 'auto', a finite number"),
        ('{"lora_alpha": 2, "alpha_pattern": {"to_q": NaN}}', "lora_alpha nan, a finite number"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_message(wan: Subject, config: str, message: str, tmp_path: Path) -> None:
    file = written(wan, "peft", tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        wan.read(file)
    save_file(load_file(file), tmp_path / "own.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="lora_adapter_metadata in its header: not JSON"):
        wan.read(tmp_path / "own.safetensors")


SPOILT: dict[str, tuple[Any, str]] = {
    "nan": (lambda name, tensor: {name: tensor * float("nan")}, "is not finite"),
    "whole numbers": (lambda name, tensor: {name: tensor.to(torch.int8)}, "is int8; finite floating-point"),
    "alphas": (
        lambda name, tensor: {name: tensor.repeat(2) if name.endswith("alpha") else tensor},
        "has 2 alphas, one is expected",
    ),
    "no rank": (lambda name, tensor: {name: tensor[:0] if "down" in name else tensor[:, :0]}, "do not fit it"),
    "twice": (
        lambda name, tensor: {name: tensor, name.replace("lora_unet_", "diffusion_model."): tensor.clone()},
        "is there twice, under two spellings",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_would_spoil_a_network_are_refused(wan: Subject, kind: str, tmp_path: Path) -> None:
    file = written(wan, "kohya", tmp_path)
    change, message = SPOILT[kind]
    tensors = load_file(file)
    if kind == "no rank":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    save_file({key: v.contiguous() for n, t in tensors.items() for key, v in change(n, t).items()}, file)
    with pytest.raises(UserError, match=message):
        wan.read(file)


def test_a_checkpoint_of_a_training_is_no_file_of_tensors(wan: Subject, tmp_path: Path) -> None:
    torch.save({"ema": load_file(written(wan, "comfy", tmp_path)), "step": 3}, tmp_path / "step.pt")
    with pytest.raises(UserError, match=r"more than tensors by name.*\(ema, step\): save the weights alone"):
        wan.read(tmp_path / "step.pt")


def test_merging_is_what_peft_computes(subject: Subject, tmp_path: Path) -> None:
    """Against diffusers' own loading of the same file into the stock network, at half strength."""
    file = written(subject, "diffusers", tmp_path)
    stock = subject.adapter.folder.load_network()
    stock.load_lora_adapter(load_file(file), prefix="transformer", adapter_name="style")  # type: ignore[operator]
    stock.set_adapters(["style"], weights=[0.5])  # type: ignore[operator]
    merged = subject.adapter.folder.load_network()
    merge_file(merged, subject.read(file), 0.5)
    expected = answer(subject, stock)
    torch.testing.assert_close(answer(subject, merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - answer(subject, subject.network)).abs().max() > 1e-3


def answer(subject: Subject, network: nn.Module) -> Tensor:
    shape = (1, *subject.adapter.codec.latent_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    condition = subject.adapter.conditioner.encode_prompts([FAMILIES[subject.name].prompts[0]])
    with torch.no_grad():
        return subject.adapter.velocity(network, x, torch.tensor([0.6]), condition)


@pytest.mark.parametrize("rank", [RANK, RANK + 2])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_an_adapter_starts_from_a_file(subject: Subject, rank: int, alpha: float | None, tmp_path: Path) -> None:
    """The network with the adapter answers as the merged one, whatever the new adapter's rank and scale."""
    file = subject.read(written(subject, "diffusers", tmp_path))
    network = subject.adapter.folder.load_network()
    add_adapter(network, "student", LoRAConfig(rank=rank, alpha=alpha, targets=TARGETS[subject.name]), seed=0)
    start_adapter(network, "student", file)
    AdapterSwitch(network, "student", None)()
    merged = subject.adapter.folder.load_network()
    merge_file(merged, file, 1.0)
    torch.testing.assert_close(answer(subject, network), answer(subject, merged), rtol=1e-4, atol=1e-4)


def test_whole_changes_of_parameters(wan: Subject, tmp_path: Path) -> None:
    """LightX2V's files change biases, norms and modulation tables too; an adapter cannot start from that."""
    tensors = load_file(written(wan, "lightx2v", tmp_path))
    changes = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", 1.0),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": ("blocks.0.attn1.norm_q.weight", 2.0),
        "diffusion_model.blocks.1.diff_m": ("blocks.1.scale_shift_table", 3.0),
        "diffusion_model.head.diff_m": ("scale_shift_table", 4.0),
        "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", 5.0),
    }
    for name, (own, value) in changes.items():
        tensors[name] = torch.full(wan.shapes[own], value)
    save_file(tensors, tmp_path / "all.safetensors")
    file = wan.read(tmp_path / "all.safetensors")
    network, before = wan.adapter.folder.load_network(), wan.network.state_dict()
    merge_file(network, file, 0.5)
    for own, value in changes.values():
        torch.testing.assert_close(network.state_dict()[own], before[own] + 0.5 * value)
    add_adapter(network, "student", LoRAConfig(rank=4, targets=TARGETS["wan"]), seed=0)
    with pytest.raises(UserError, match=r"roles\.student\.loras, which merges it"):
        start_adapter(network, "student", file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(3, 4)}, "blocks.9"),
        (lambda t: t | {"text_encoder.layer.lora_A.weight": torch.zeros(3, 4)}, "belong to no layer"),
        (lambda t: {k: v for k, v in t.items() if ".lora_B" not in k}, r"has no factor B \(up\)"),
        (lambda t: {k: v[:, :-1] if ".lora_A" in k else v for k, v in t.items()}, "do not fit it"),
        (lambda t: t | {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(1)}, "is a DoRA"),
        (lambda t: {"diffusion_model.blocks.0.self_attn.q.hada_w1_a": torch.ones(1)}, "is a LoHa"),
        (lambda t: {}, "holds no adapter"),
    ],
    ids=["other depth", "text encoder", "half", "shape", "dora", "loha", "empty"],
)
def test_files_that_do_not_fit(wan: Subject, change: Any, message: str, tmp_path: Path) -> None:
    tensors = load_file(written(wan, "comfy", tmp_path))
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match=message):
        wan.read(tmp_path / "changed.safetensors")


def test_paths_that_hold_no_file(wan: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        wan.read(tmp_path / "none")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        wan.read(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"several .* a.safetensors, b.safetensors"):
        wan.read(tmp_path)


def test_an_adapter_that_is_too_small(wan: Subject, tmp_path: Path) -> None:
    file = wan.read(written(wan, "comfy", tmp_path))
    network = wan.adapter.folder.load_network()
    add_adapter(network, "student", LoRAConfig(rank=2, targets=TARGETS["wan"]), seed=0)
    with pytest.raises(UserError, match=r"has rank 3; set roles\.student\.lora\.rank"):
        start_adapter(network, "student", file)
    add_adapter(network, "critic", LoRAConfig(rank=4), seed=0)
    with pytest.raises(UserError, match=r"add to roles\.critic\.lora\.targets: .*ffn"):
        start_adapter(network, "critic", file)


KOHYA, COMFY = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
FLUX_JOINED = tuple(f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
Z_IMAGE_JOINED = tuple(f"layers.0.attention.to_{name}" for name in "qkv")
AUTHORS: dict[str, tuple[str, tuple[str, str], tuple[str, ...]]] = {
    "flux, comfy": ("diffusion_model.double_blocks.0.img_attn.qkv", COMFY, FLUX_JOINED),
    "z_image, comfy": ("diffusion_model.layers.0.attention.qkv", COMFY, Z_IMAGE_JOINED),
    "z_image, out": ("diffusion_model.layers.0.attention.out", COMFY, ("layers.0.attention.to_out.0",)),
    "flux": ("lora_unet_double_blocks_0_img_attn_qkv", KOHYA, FLUX_JOINED),
    "flux2": ("diffusion_model.double_blocks.0.img_attn.qkv", COMFY, FLUX_JOINED),
    "z_image": ("lora_unet_layers_0_attention_qkv", KOHYA, Z_IMAGE_JOINED),
    "krea2": ("diffusion_model.blocks.0.attn.wq", COMFY, ("transformer_blocks.0.attn.to_q",)),
    "ltx2": ("diffusion_model.patchify_proj", COMFY, ("proj_in",)),
}
"""A layer in its authors' names, with the suffixes of its factors, and the layers that it is here, top to bottom."""


@pytest.mark.parametrize("name", AUTHORS)
def test_layers_of_other_names_go_through_diffusers_converter(name: str, tiny_wan: Path, tmp_path: Path) -> None:
    """Joined projections too; an alpha of twice the rank, half the strength."""
    stem, (down, up), layers = AUTHORS[name]
    adapter = made_family(name.partition(",")[0], tiny_wan.parent)
    network, shapes = adapter.folder.load_network(), parameter_shapes(adapter.folder.load_network())
    generator, rows = torch.Generator().manual_seed(0), [shapes[f"{layer}.weight"][0] for layer in layers]
    a = torch.randn(RANK, shapes[f"{layers[0]}.weight"][1], generator=generator)
    b = torch.randn(sum(rows), RANK, generator=generator)
    tensors = {stem + down: a, stem + up: b, f"{stem}.alpha": torch.tensor(2.0 * RANK)}
    save_file(tensors, tmp_path / "style.safetensors")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    merge_file(network, read_lora(tmp_path, shapes, load_exporter(adapter.config)), 0.5)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.weight" for layer in layers}
    for layer, part in zip(layers, b.split(rows), strict=True):
        expected = before[f"{layer}.weight"] + part @ a
        torch.testing.assert_close(network.state_dict()[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.diff_b": (48,)}, r"4 of its tensors .*img_attn_qkv\.alpha"),
        ({"lora_unet_double_blocks_9_img_attn_proj.lora_down.weight": (3, 16)}, "1 of its .*double_blocks_9_img_attn"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (3, 16)}, "qkv changes layers that have tensors"),
    ],
    ids=["a part that it leaves out", "no such block", "twice"],
)
def test_what_the_converter_leaves_out_is_refused(
    more: dict[str, tuple[int, ...]], message: str, tiny_wan: Path, tmp_path: Path
) -> None:
    stem, (down, up), layers = AUTHORS["flux"]
    adapter = made_family("flux", tiny_wan.parent)
    shapes = parameter_shapes(adapter.folder.load_network())
    rows, columns = shapes[f"{layers[0]}.weight"]
    tensors = {stem + down: torch.ones(3, columns), stem + up: torch.ones(3 * rows, 3), f"{stem}.alpha": torch.ones(())}
    save_file(tensors | {key: torch.ones(shape) for key, shape in more.items()}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path, shapes, load_exporter(adapter.config))
