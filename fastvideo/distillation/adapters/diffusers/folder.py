"""Diffusers pipeline folders: networks with the kernels that a run asks for, flow maps, and files of other layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.abilities import FolderAbilities
from fastvideo.distillation.adapters.diffusers.attention import (
    NATIVE,
    check_attention,
    choose_attention,
    keep_dtype_of_attention,
)
from fastvideo.distillation.adapters.diffusers.flow_map import HEAD_FILE, add_head, load_head, save_head, without_head
from fastvideo.distillation.adapters.diffusers.gguf_file import (
    FEW_BITS,
    GGUFFile,
    packed_matrices,
    shape_of,
    with_packed,
)
from fastvideo.distillation.adapters.diffusers.kernels import check_kernel, counting, native_kernel
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, library_class, load_config
from fastvideo.distillation.adapters.diffusers.plain import PlainFolder
from fastvideo.distillation.adapters.diffusers.single_file import (
    OTHER_CONFIG,
    check_fit,
    in_diffusers,
    is_single_file,
    load_single_file,
    load_tensors,
    of_network,
)
from fastvideo.distillation.adapters.diffusers.sources import read_object
from fastvideo.distillation.scaling import StoredTensor
from fastvideo.errors import UserError

INDEX, WHOLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"
"""Index of weights in several files, and the file of weights that are in one."""
RETIRED = frozenset({"prompt_cache"})
"""Fields of a ``model`` section in recipes and checkpoints of earlier versions, without meaning for the weights."""
GRAPHS = 64
"""Graphs of a kind of block: three roles, with and without gradient (and of the input), at a few sizes of a batch."""


class DiffusersFolder(PlainFolder[ConfigT], FolderAbilities):
    """Folder of a diffusers pipeline, or beside it a single file of weights in any layout."""

    _written = (*PlainFolder._written, HEAD_FILE)

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

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network of a folder, or of a single file."""
        parts = self._parts(path)
        if not is_single_file(path):
            return super().load_network(path, dtype)
        return self._from_file(str(path), dtype, parts[0]).to(self.pipeline.device)

    def from_file(self, path: str | None) -> nn.Module | None:
        return self._from_file(str(path), torch.float32, self._parts(path)[0]) if is_single_file(path) else None

    def _from_file(self, path: str, dtype: torch.dtype, part: str) -> nn.Module:
        network = self._skeleton(path, dtype, part)
        load_single_file(network, path, self._stored(path))
        return self._ready(network, path)

    def _stored(self, path: str) -> Mapping[str, Tensor]:
        """Tensors of a single file."""
        return load_tensors(Path(path))[0]

    def load_gguf(self, path: str, dtype: torch.dtype, where: str) -> nn.Module:
        network, state = self._gguf(path, dtype, GGUFFile(path, where).tensors())
        config = Path(*self.pipeline.config_place(path, self.parts[0]))
        return self._ready(with_packed(network, state, str(config), dtype), path).to(self.pipeline.device)

    def check_gguf(self, path: str, where: str) -> None:
        if len(self.parts) > 1:
            raise UserError(
                f"{where}: one file, and {self.config.path} has {' and '.join(self.parts)}: give a pipeline folder "
                f"with both; {FEW_BITS}"
            )
        file = GGUFFile(path, where)
        try:
            self._gguf(path, self.compute_dtype, file.tensors(empty=True))
        except UserError as error:
            raise UserError(f"{where}: {error} (its architecture is {file.architecture})") from error

    def gguf_sizes(self, network: nn.Module, path: str) -> Mapping[Tensor, int]:
        _, state = self._gguf(path, self.compute_dtype, GGUFFile(path, path).tensors(empty=True))
        packed = packed_matrices(network, state)
        return {p: packed[name].nbytes for name, p in network.named_parameters() if name in packed}

    def _gguf(
        self, path: str, dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """An empty network for a file's tensors, and these under its names."""
        (part,) = self._parts(path)
        network = self._skeleton(path, dtype, part)
        state = in_diffusers(network, of_network(tensors), path)
        check_fit(network, {name: shape_of(tensor) for name, tensor in state.items()}, path)
        return network, state

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """Parameters on the meta device; buffers (tables of positions) and a flow map's head are real."""
        networks = [self._skeleton(path, dtype, part) for part in self._parts(path)]
        return self._joined([self._ready(network, path) for network in networks], path)

    def _parts(self, path: str | None) -> tuple[str, ...]:
        """Parts of the folder behind ``path``, as many as the run's own model has.

        Raises:
            UserError: if it has more or fewer networks than the model, or is one file for a model of two.
        """
        found = self._parts_in(self.pipeline.resolved(path))
        if found != self.parts or (len(found) > 1 and is_single_file(path)):
            what = "one file" if is_single_file(path) else f"a folder with {' and '.join(found)}"
            raise UserError(
                f"{path} is {what}, and the model {self.config.path} has {' and '.join(self.parts)}: all roles of a "
                f"model need the same networks; give a folder of that kind"
            )
        return found

    def _skeleton(self, path: str | None, dtype: torch.dtype, part: str) -> nn.Module:
        from accelerate import init_empty_weights

        place = self.pipeline.config_place(path, part)
        config = load_config(self._class, *place)
        try:
            with init_empty_weights(include_buffers=False):
                network = self._class.from_config(config)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            file, name = Path(*place, "config.json"), self.pipeline.spec.network
            raise UserError(f"{file}: diffusers makes no {name} of it: {error or type(error).__name__}") from error
        kept = set(network._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return network  # type: ignore[no-any-return]

    def _ready(self, network: nn.Module, path: str | None) -> nn.Module:
        """With the kernels of the run, and a flow map's head."""
        choose_attention(network, self.config.attention_backend)
        keep_dtype_of_attention(network)
        if self.config.compile_blocks:
            compile_blocks(network)
        load_head(network, self.pipeline.spec.time_embedding, Path(self.pipeline.resolved(path)))
        return super()._ready(network, path)

    def files(self, path: str | None) -> Mapping[str, StoredTensor]:
        """Places of the network's parameters: in one file for all of a part, or several with an index.

        Raises:
            UserError: for weights that are not those of the part's ``config.json``.
        """
        if is_single_file(path):
            raise UserError(
                f"{path} is one file in another layout, which is read whole; for parallel.shard make a folder of it: "
                f"fastvideo merge {self.config.path} --network {path} --out FOLDER"
            )
        parts, found = self._parts(path), dict[str, StoredTensor]()
        for part in parts:
            prefix = f"{part}." if len(parts) > 1 else ""  # as in the module that holds both
            folder = Path(self.pipeline.resolved(path)) / part
            files = _files_of(folder)
            check_stored(self._skeleton(path, torch.float32, part), files, folder)
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

    def _save_network(self, folder: Path, network: nn.Module) -> None:
        """A flow map's head is written beside the network and not into it, which stock diffusers goes on to load."""
        with without_head(network) as head:
            super()._save_network(folder, network)
        if head is not None:
            save_head(head, folder)


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


def check_stored(network: Any, files: Mapping[str, Path], folder: Path) -> None:
    """:func:`check_fit` of a component's safetensors files, but for tensors that diffusers passes over."""
    from safetensors import safe_open

    shapes, ignored = dict[str, tuple[int, ...]](), network._keys_to_ignore_on_load_unexpected or ()
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    own = network.state_dict().keys()
    passed_over = {name for name in shapes.keys() - own if any(re.search(key, name) for key in ignored)}
    check_fit(network, {name: shapes[name] for name in shapes.keys() - passed_over}, str(folder), OTHER_CONFIG)


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, which it lists as not to be split between devices.

    A block inside another listed one is a part of that.
    """
    found, inside, names = list[nn.Module](), set[nn.Module](), block_classes(network)
    for module in network.modules():
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


def read_recipe(source: str) -> dict[str, Any]:
    """``recipe.json`` of a pipeline folder; empty if it has none.

    Raises:
        UserError: if the file is not a JSON object.
    """
    file = Path(source) / "recipe.json"
    recipe = read_object(file) if file.is_file() else {}
    if isinstance(model := recipe.get("model"), dict):
        recipe["model"] = {key: value for key, value in model.items() if key not in RETIRED}
    return recipe
