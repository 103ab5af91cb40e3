"""Diffusers pipeline folders: reading networks, with the kernels that a run asks for, and writing complete folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import torch
from torch import nn

from fastvideo.distillation.adapters.base import ModelFolder
from fastvideo.distillation.adapters.diffusers.attention import (
    NATIVE,
    check_attention,
    choose_attention,
    keep_dtype_of_attention,
)
from fastvideo.distillation.adapters.diffusers.flow_map import HEAD_FILE, add_head, load_head, save_head, without_head
from fastvideo.distillation.adapters.diffusers.kernels import check_kernel, counting, native_kernel
from fastvideo.distillation.adapters.diffusers.pipeline import (
    ConfigT,
    Pipeline,
    library_class,
    load_component,
    load_config,
)
from fastvideo.distillation.adapters.diffusers.single_file import is_single_file, load_single_file
from fastvideo.distillation.experts import networks_of
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import StoredTensor
from fastvideo.errors import UserError

INDEX, WHOLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"
"""Index of weights in several files, and the file of weights that are in one."""
GRAPHS = 64
"""Graphs of a kind of block: three roles, with and without gradient (and of the input), at a few sizes of a batch."""
RETIRED = frozenset({"prompt_cache"})
"""Fields of a ``model`` section in recipes and checkpoints of earlier versions, without meaning for the weights."""


class DiffusersFolder(ModelFolder, Generic[ConfigT]):
    """Folder of a diffusers pipeline, with one network or two experts."""

    def __init__(self, pipeline: Pipeline[ConfigT]) -> None:
        self.pipeline, self.config, self.parts = pipeline, pipeline.config, pipeline.parts
        self.published_guidance: GuidanceValue = pipeline.spec.published_guidance
        self.compute_dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    @property
    def recipe(self) -> Mapping[str, Any]:
        return read_recipe(self.pipeline.source)

    def recipe_of(self, path: str | None) -> Mapping[str, Any]:
        return {} if is_single_file(path) else read_recipe(self.pipeline.resolved(path))

    @cached_property
    def kernels(self) -> str:
        """Attention kernel with torch's choice behind it, compiled or eager blocks, and precision."""
        backend, blocks = self.config.attention_backend, "compiled" if self.config.compile_blocks else "eager"
        if backend == NATIVE:
            backend = f"{NATIVE} -> {native_kernel(self.head_width, self.compute_dtype, self.pipeline.device)}"
        return f"attention {backend}, blocks {blocks}, {self.config.precision}"

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        config = self.pipeline.network_config()
        return int(
            config["attention_head_dim"] if "attention_head_dim" in config else config["dim"] // config["n_heads"]
        )

    def check_kernels(self, *, trained: bool) -> None:
        """Try the attention backend at the network's width, dtype and device."""
        name, device = self.config.attention_backend, self.pipeline.device
        check_attention(name)
        check_kernel(name, self.head_width, self.compute_dtype, device, trained=trained)

    def counting(self, add: Callable[[int], None]) -> AbstractContextManager[None]:
        """Give ``add`` the operations of attention that torch's counter does not see."""
        return counting(add)

    @cached_property
    def _class(self) -> Any:
        return library_class("diffusers", self.pipeline.spec.network)

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode (published ones have no dropout), with a flow map's head."""
        if is_single_file(path):
            network = self._skeletons(path, dtype)[0]
            load_single_file(network, str(path))
            return self._ready(network, path).to(self.pipeline.device)
        source, parts = self.pipeline.resolved(path), self._parts(path)
        networks = [load_component(self._class, source, part, torch_dtype=dtype) for part in parts]
        return self._joined([self._ready(network, path) for network in networks], path).to(self.pipeline.device)

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """Parameters on the meta device; buffers (tables of positions) and a flow map's head are real."""
        return self._joined([self._ready(network, path) for network in self._skeletons(path, dtype)], path)

    def _joined(self, networks: Sequence[nn.Module], path: str | None) -> nn.Module:
        """One network of those in the parts of the folder behind ``path``."""
        (network,) = networks
        return network

    def _parts(self, path: str | None) -> tuple[str, ...]:
        """Parts of the folder behind ``path``, as many as the run's own model has.

        Raises:
            UserError: if it has more or fewer networks than the model, or is one file for a model of two.
        """
        found = self.pipeline.parts_of(self.pipeline.resolved(path))
        if found != self.parts or (len(found) > 1 and is_single_file(path)):
            what = "one file" if is_single_file(path) else f"a folder with {' and '.join(found)}"
            raise UserError(
                f"{path} is {what}, and the model {self.config.path} has {' and '.join(self.parts)}: all roles of a "
                f"model need the same networks; give a folder of that kind"
            )
        return found

    def _skeletons(self, path: str | None, dtype: torch.dtype) -> list[nn.Module]:
        return [self._skeleton(path, dtype, part) for part in self._parts(path)]

    def _skeleton(self, path: str | None, dtype: torch.dtype, part: str) -> nn.Module:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            network = self._class.from_config(load_config(self._class, self.pipeline.resolved(path), part))
        kept = set(network._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return network  # type: ignore[no-any-return]

    def _ready(self, network: nn.Module, path: str | None) -> nn.Module:
        choose_attention(network, self.config.attention_backend)
        keep_dtype_of_attention(network)
        if self.config.compile_blocks:
            compile_blocks(network)
        load_head(network, self.pipeline.spec.time_embedding, Path(self.pipeline.resolved(path)))
        return network.eval()

    def files(self, path: str | None) -> Mapping[str, StoredTensor]:
        """Places of the network's parameters: in one file for all of a part, or several with an index."""
        if is_single_file(path):
            raise UserError(
                f"{path} is one file in another layout, which is read whole; for parallel.shard make a folder of it: "
                f"fastvideo merge {self.config.path} --network {path} --out FOLDER"
            )
        parts, found = self._parts(path), dict[str, StoredTensor]()
        for part in parts:
            prefix = f"{part}." if len(parts) > 1 else ""  # as in the module that holds both
            files = _files_of(Path(self.pipeline.resolved(path)) / part)
            found |= {f"{prefix}{name}": StoredTensor(file, name) for name, file in files.items()}
        return found

    def add_flow_map(self, network: nn.Module) -> None:
        add_head(network, self.pipeline.spec.time_embedding)

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        source, spec = self.pipeline.source, self.pipeline.spec
        encoder, vae = library_class("transformers", spec.text_encoder), library_class("diffusers", spec.vae)
        with torch.device("meta"):
            text = encoder(encoder.config_class.from_pretrained(Path(source) / "text_encoder"))
            return {"text encoder": text, "VAE": vae.from_config(load_config(vae, source, "vae"))}

    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """A folder that the pipeline's ``from_pretrained`` loads, with everything of the source but its network.

        With ``slim`` the text encoder, its tokenizer and the VAE are symbolic links to the source's folders.

        A flow map's head is written beside the network and not into it, which stock diffusers goes on to load.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for item in Path(self.pipeline.source).iterdir():
            if item.name in (*self.parts, "recipe.json", HEAD_FILE):
                continue
            if item.is_dir() and slim and item.name != "scheduler":
                (folder / item.name).symlink_to(item.resolve(), target_is_directory=True)
            elif item.is_dir():
                shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
            else:
                shutil.copy2(item, folder / item.name)
        with without_head(network) as head:
            for part, own in zip(self.parts, networks_of(network), strict=True):
                own.save_pretrained(folder / part)
        if head is not None:
            save_head(head, folder)
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def _files_of(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a component."""
    if (folder / INDEX).is_file():
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in found.items()}
    if not (folder / WHOLE).is_file():
        raise UserError(f"{folder} has neither {WHOLE} nor {INDEX}: split networks are read from safetensors alone")
    from safetensors import safe_open

    with safe_open(folder / WHOLE, "pt") as stored:
        return dict.fromkeys(stored.keys(), folder / WHOLE)


def read_recipe(source: str) -> dict[str, Any]:
    """``recipe.json`` of a pipeline folder; empty if it has none.

    Raises:
        UserError: if the file is not a JSON object.
    """
    file = Path(source) / "recipe.json"
    try:
        recipe = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{file}: an object is expected, found {type(recipe).__name__}")
    if isinstance(model := recipe.get("model"), dict):
        recipe["model"] = {key: value for key, value in model.items() if key not in RETIRED}
    return recipe


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, which it lists as not to be split between devices.

    A block inside another listed one is a part of that.
    """
    found, inside = list[nn.Module](), set[nn.Module]()
    for one in networks_of(network):
        names = block_classes(one)
        for module in one.modules():
            if type(module).__name__ in names and module not in inside:
                found.append(module)
                inside.update(module.modules())
    return found


def block_classes(network: Any) -> set[str]:
    """Names of the classes of a diffusers network's repeated blocks."""
    return set(network._no_split_modules or network._repeated_blocks or ())


def compile_blocks(network: nn.Module) -> None:
    """Compile every repeated block in place: one graph serves all of a kind, in seconds instead of minutes.

    Names of parameters stay, and a copy of the network (its average, an export) is not compiled. Each role's adapter,
    with and without gradient, at each size of a batch, has a graph of its own. torch stops at 8 of them and runs the
    rest eagerly; :data:`GRAPHS` are enough for all that a run calls.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for block in repeated_blocks(network):
        block.compile()
