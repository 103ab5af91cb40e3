"""Roles that share one frozen network: each has an adapter (LoRA, arXiv 2106.09685) or none, which is the teacher.

peft puts the adapters into the network; which of them is on is decided anew for every forward, by the role that calls.
peft's own ``set_adapter`` is never used: it turns off ``requires_grad`` of the other adapters, so that switching
between a role's forward and its backward would silently lose gradients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.engine.parallel.sharding import full
from fastvideo.distillation.rng import seeded
from fastvideo.errors import UserError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers' ``load_lora_weights`` looks for an adapter in a folder."""
DIFFUSERS_PREFIX = "transformer."

_LAYERS: WeakSet[Any] = WeakSet()
_LAYERS_IN: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def add_adapter(network: nn.Module, name: str, options: LoRAConfig, seed: int) -> None:
    """Put a trainable adapter that changes nothing yet into a network, whose own parameters are frozen.

    A is drawn as ``nn.Linear`` draws its weights, B is zero; float32, on the network's device (on the host, for a
    network on the meta device), the same on every process.

    Raises:
        UserError: if a target names no linear layer of the network.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    _check_targets(network, name, options.targets)
    alpha: Any = options.rank if options.alpha is None else options.alpha
    config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=list(options.targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
        inject_adapter_in_model(config, network, name)
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    _LAYERS.update(layers)
    _LAYERS_IN.clear()
    generator = seeded(seed)
    for layer in layers:
        if name in layer.lora_A:
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


def layers_in(module: nn.Module) -> list[Any]:
    """The layers of a module that have adapters."""
    if not _LAYERS:
        return []
    if module not in _LAYERS_IN:
        _LAYERS_IN[module] = [m for m in module.modules() if m in _LAYERS]
    return _LAYERS_IN[module]


def select(module: nn.Module, name: str | None) -> None:
    """Turn one adapter on and all others off, ``None`` for all off; no parameter is touched."""
    for layer in layers_in(module):
        layer._disable_adapters, layer._active_adapter = name is None, [name]


def selected(module: nn.Module) -> str | None:
    """The adapter that is on; ``None`` if none is, or there are none."""
    layers = layers_in(module)
    return layers[0]._active_adapter[0] if layers and not layers[0]._disable_adapters else None


class RoleView(nn.Module):
    """One role's view of a network that several share: its own adapter on, the others off.

    Its parameters and its state are the adapter alone, under diffusers' names (``blocks.0.attn1.to_q.lora_A.weight``);
    a role without an adapter has none. Everything else (config, blocks) is the network's.

    Args:
        base: the shared network.
        adapter: of this role.
        path: where the network's own weights come from.
    """

    def __init__(self, base: nn.Module, adapter: str | None, path: str | None) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not as a child: its parameters are not this role's
        self.adapter, self.path = adapter, path

    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward with this role's adapter."""
        select(self.base, self.adapter)
        return self.base(*args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's, by name."""
        for name, parameter in self.base.named_parameters():
            layer, _, owner = name.removesuffix(".weight").rpartition(".")
            if owner == self.adapter and layer.endswith((".lora_A", ".lora_B")):
                yield f"{prefix}{layer}.weight", parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter's tensors, or shards of them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @property
    def scaling(self) -> float:
        """``alpha / rank``: what the product of B and A is multiplied with."""
        return float(layers_in(self.base)[0].scaling[self.adapter])


def is_adapter(state: Mapping[str, Tensor]) -> bool:
    """Whether a role's state is that of an adapter."""
    return any(name.endswith(".lora_A.weight") for name in state)


def portable(adapter: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """An adapter under diffusers' names for a pipeline, float32, with ``alpha / rank`` multiplied into B."""
    return {
        f"{DIFFUSERS_PREFIX}{name}": (tensor.float() * (scaling if ".lora_B." in name else 1.0)).contiguous()
        for name, tensor in adapter.items()
    }


def shared_by(network: nn.Module) -> nn.Module:
    """The network that computes: the shared one behind a view, or the network itself."""
    return network.base if isinstance(network, RoleView) else network


def gather_adapter(view: RoleView) -> dict[str, Tensor]:
    """The whole adapter on the host; all processes take part."""
    return {name: full(tensor).cpu() for name, tensor in view.state_dict().items()}


@torch.no_grad()
def merge(network: nn.Module, adapter: Mapping[str, Tensor], scaling: float) -> None:
    """Add an adapter to the weights of a network without adapters: ``W + scaling B A``, computed in float32."""
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = network.get_parameter(f"{layer}.weight")
            change = adapter[f"{layer}.lora_B.weight"].float() @ adapter[name].float() * scaling
            weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
