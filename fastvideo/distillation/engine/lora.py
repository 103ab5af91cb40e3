"""Roles that share one frozen network: each has an adapter (LoRA, arXiv 2106.09685) or none, which is the teacher.

peft puts the adapters into the network; each forward selects the calling role's adapter (:class:`AdapterSwitch`).
peft's own ``set_adapter`` is never used: it turns off ``requires_grad`` of the other adapters, so that switching
between a role's forward and its backward would silently lose gradients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.engine.parallel.sharding import full
from fastvideo.distillation.engine.training import tensors_of
from fastvideo.distillation.experts import by_expert, side_file
from fastvideo.distillation.lora_file import LoRAFile
from fastvideo.distillation.rng import seeded
from fastvideo.errors import UserError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""File name that diffusers' ``load_lora_weights`` expects in a folder."""
Merge = tuple[LoRAFile, float]
"""A LoRA file and the factor with which it is added to a network."""


def add_adapter(network: nn.Module, name: str, options: LoRAConfig, seed: int | None) -> None:
    """Add a trainable adapter that changes nothing yet to a network, and freeze the network's own parameters.

    A is drawn as ``nn.Linear`` draws its weights, B is zero; float32, on the network's device (on the host for a
    network on the meta device), the same on every process. Without a seed both are on the meta device.

    Raises:
        UserError: if a target names no linear layer of the network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(network, name, options.targets)
    alpha: Any = options.rank if options.alpha is None else options.alpha
    config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=list(options.targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # one per role
        inject_adapter_in_model(config, network, name, low_cpu_mem_usage=True)  # on the meta device
    generator = None if seed is None else seeded(seed)
    for layer in adapted_layers(network):
        # Autocast casts the input to the compute dtype in any case: peft's float32 copy of it only takes memory.
        layer.cast_input_dtype_enabled = False
        if name in layer.lora_A and generator is not None:
            _initialise(layer, name, generator)
    for key, parameter in network.named_parameters():
        parameter.requires_grad_("lora_A" in key or "lora_B" in key)


def _check_targets(network: nn.Module, role: str, targets: Sequence[str]) -> None:
    linear = [n.removesuffix(".base_layer") for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    lacking = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if lacking:
        kinds = sorted({".".join(part for part in name.split(".")[2:]) for name in linear if name.count(".") > 1})
        raise UserError(
            f"roles.{role}.lora.targets: {', '.join(lacking)} is no linear layer of {type(network).__name__}; its "
            f"blocks have {', '.join(kinds)}"
        )


def _initialise(layer: Any, name: str, generator: torch.Generator) -> None:
    base: Tensor = layer.get_base_layer().weight
    device = torch.device("cpu") if base.is_meta else base.device
    down = torch.empty(layer.lora_A[name].weight.shape)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    layer.lora_A[name].weight = nn.Parameter(down.to(device))
    layer.lora_B[name].weight = nn.Parameter(torch.zeros(layer.lora_B[name].weight.shape, device=device))


def adapted_layers(module: nn.Module) -> list[Any]:
    """Layers of a module that hold adapters (peft's ``LoraLayer``)."""
    return [layer for layer in module.modules() if "lora_A" in dict(layer.named_children())]


def select(layers: Sequence[Any], name: str | None) -> None:
    """Turn one adapter on and all others off, ``None`` for all off; no parameter is touched."""
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = name is None, [name]


def selected(layers: Sequence[Any]) -> str | None:
    """Name of the adapter that is on; ``None`` if none is, or there are none."""
    return layers[0]._active_adapter[0] if layers and not layers[0]._disable_adapters else None


class AdapterSwitch:
    """Turns one role's adapter on in a network that several roles share: ``Denoiser.select`` of that role.

    Args:
        network: the shared network, with all its adapters in it.
        adapter: the role's own, by name; ``None`` turns all off.
        path: source of the network's own weights.
        merged: files that were merged into them.
    """

    def __init__(self, network: nn.Module, adapter: str | None, path: str | None, merged: Sequence[Merge] = ()) -> None:
        self.network, self.adapter, self.path, self.merged = network, adapter, path, merged
        self._layers = adapted_layers(network)

    def __call__(self) -> None:
        select(self._layers, self.adapter)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the role's adapter under diffusers' names (``blocks.0.attn1.to_q.lora_A.weight``)."""
        found = {}
        for name, parameter in self.network.named_parameters():
            layer, _, owner = name.removesuffix(".weight").rpartition(".")
            if owner == self.adapter and layer.endswith((".lora_A", ".lora_B")):
                found[f"{layer}.weight"] = parameter
        return found

    @property
    def scaling(self) -> float:
        """``alpha / rank``: the factor on the product of B and A."""
        return float(self._layers[0].scaling[self.adapter])


def switch_of(handle: RoleHandle) -> AdapterSwitch | None:
    """The switch of a role that trains an adapter; ``None`` for a role with weights of its own, and for the teacher."""
    return handle.select if isinstance(handle.select, AdapterSwitch) and handle.select.adapter else None


def is_adapter(state: Mapping[str, Tensor]) -> bool:
    """True if a role's state is that of an adapter."""
    return any(name.endswith(".lora_A.weight") for name in state)


def portable(adapter: Mapping[str, Tensor], scaling: float, part: str) -> dict[str, Tensor]:
    """An adapter under diffusers' names for a pipeline, float32, with ``alpha / rank`` multiplied into B.

    ``part`` is the pipeline's name of the network.
    """
    return {
        f"{part}.{name}": (tensor.float() * (scaling if ".lora_B." in name else 1.0)).contiguous()
        for name, tensor in adapter.items()
    }


def adapter_files(adapter: Mapping[str, Tensor], scaling: float, part: str) -> dict[str, dict[str, Tensor]]:
    """:func:`portable` adapters by file name: one, or one for each expert of a network of two.

    Both name the network ``part``, as stock pipelines read the second with ``load_into_transformer_2=True``.
    """
    return {side_file(side, ADAPTER_FILE): portable(own, scaling, part) for side, own in by_expert(adapter).items()}


def gather_adapter(handle: RoleHandle) -> dict[str, Tensor]:
    """Gather a role's adapter on the host; all processes take part."""
    return {name: full(tensor).cpu() for name, tensor in tensors_of(handle).items()}


def merge(network: nn.Module, adapter: Mapping[str, Tensor], scaling: float) -> None:
    """Add an adapter to the weights of a network: ``W + scaling B A``, computed in float32."""
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            change = adapter[f"{layer}.lora_B.weight"].float() @ adapter[name].float() * scaling
            add_to(own_parameter(network, f"{layer}.weight"), change)


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shape of each parameter of a network, its adapters aside."""
    own = ((name, p) for name, p in network.named_parameters() if ".lora_A." not in name and ".lora_B." not in name)
    return {name.replace(".base_layer.", "."): tuple(parameter.shape) for name, parameter in own}


def merge_file(network: nn.Module, file: LoRAFile, weight: float) -> None:
    """Add ``weight`` times everything that a LoRA file changes; other roles' adapters in the network stay apart.

    A network on the meta device, which only counts, stays as it is.
    """
    merge(network, file.tensors(), weight)
    for name, change in file.differences.items():
        add_to(own_parameter(network, name), change.float() * weight)


def own_parameter(network: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a network by its name without adapters."""
    layer, _, kind = name.rpartition(".")
    module: Any = network.get_submodule(layer)
    owner: nn.Module = module.get_base_layer() if "base_layer" in dict(module.named_children()) else module
    return owner.get_parameter(kind)


@torch.no_grad()
def add_to(parameter: nn.Parameter, change: Tensor) -> None:
    """Add a whole tensor to a parameter that may be split between processes, in float32."""
    if parameter.is_meta:
        return
    change = change.to(parameter.device)
    if isinstance(parameter, DTensor):
        change = distribute_tensor(change, parameter.device_mesh, parameter.placements)
    parameter.copy_((parameter.float() + change).to(parameter.dtype))


@torch.no_grad()
def start_adapter(network: nn.Module, role: str, file: LoRAFile) -> None:
    """Give a role's new adapter, not yet split between processes, the change that a LoRA file makes.

    A file of a lower rank fills the first rows and leaves the others as drawn, with zeros in B: the change is the same.

    Raises:
        UserError: if the file changes what the adapter does not, or its rank is higher.
    """
    where = f"roles.{role}.lora.init_from: {file.source}"
    if file.differences:
        raise UserError(
            f"{where} changes whole parameters as well ({', '.join(sorted(file.differences)[:3])}), which an adapter "
            f"cannot: put it into roles.{role}.loras, which merges it before training"
        )
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Module) and _adapts(m, role)}
    outside = sorted({layer.split(".", 2)[-1] for layer in file.factors if layer not in layers})
    if outside:
        raise UserError(f"{where} changes layers that are not adapted; add to roles.{role}.lora.targets: {outside}")
    for layer, (down, up) in file.factors.items():
        own: Any = layers[layer]
        rank = own.r[role]
        if down.shape[0] > rank:
            raise UserError(f"{where} has rank {down.shape[0]}; set roles.{role}.lora.rank to it or more, not {rank}")
        own.lora_A[role].weight[: down.shape[0]] = down.to(own.lora_A[role].weight)
        own.lora_B[role].weight[:, : down.shape[0]] = up.to(own.lora_B[role].weight) / own.scaling[role]


def _adapts(module: nn.Module, role: str) -> bool:
    children = dict(module.named_children())
    return "lora_A" in children and role in dict(children["lora_A"].named_children())
