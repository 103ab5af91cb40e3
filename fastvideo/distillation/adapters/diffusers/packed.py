"""Frozen networks whose matrices are stored in fewer bits: bitsandbytes' nf4, torchao's int8, diffusers' fp8 storage.

A network is read on the host like any other, whatever its weights come from, and its matrices are packed one by one on
their way to the device. (diffusers' loaders with a quantisation config read pipeline folders alone, and refuse
bitsandbytes without a GPU.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvideo.distillation.scaling import Quantise
from fastvideo.distillation.types import UserError

PACKAGES: Mapping[Quantise, str] = {"nf4": "bitsandbytes", "int8": "torchao"}
"""Packages that the kinds need, by the names that import them."""
BLOCK = 64
"""Numbers that share a float32 scale in nf4."""
CODES_BYTES = 16 * 4
"""Bytes of the table of values behind nf4's codes; every matrix has its own."""
ROW_BYTES = 4 + 1
"""Bytes of the float32 scale and the zero point of a row in int8."""
FLOAT8 = torch.float8_e4m3fn


def check_installed(kind: Quantise, where: str) -> None:
    """Check that the package of a kind is installed.

    Raises:
        UserError: naming the extra to install, and the kind that needs none.
    """
    package = PACKAGES.get(kind)
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"{where} needs {package}, which is not installed: pip install 'fastvideo-distillation[quantise]'; "
            f"fp8_storage needs no package"
        )


def packed_sizes(layers: Mapping[str, nn.Linear], kind: Quantise) -> dict[Tensor, int]:
    """Bytes of each parameter of the layers that :func:`pack` stores in another way."""
    if kind == "fp8_storage":
        return {p: p.numel() for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None}
    return {layer.weight: _matrix_bytes(layer.weight, kind) for layer in layers.values()}


def _matrix_bytes(weight: Tensor, kind: Quantise) -> int:
    count = weight.numel()
    if kind == "int8":
        return count + weight.shape[0] * ROW_BYTES
    return math.ceil(count / 2) + math.ceil(count / BLOCK) * 4 + CODES_BYTES


def largest_matrix(layers: Mapping[str, nn.Linear]) -> int:
    """Bytes of the largest matrix as it is while it computes: one at a time is whole."""
    return max((layer.weight.nbytes for layer in layers.values()), default=0)


def pack(
    network: nn.Module, layers: Mapping[str, nn.Linear], kind: Quantise, device: torch.device, where: str
) -> nn.Module:
    """:func:`freeze` a network, the matrices of whose ``layers`` (its own, by name) are stored in fewer bits.

    Its calls compute in the dtype that the matrices had.
    """
    network.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, PACKERS[kind](layer.to(device)))
    return freeze(network, device, where)


def freeze(network: nn.Module, device: torch.device, where: str) -> nn.Module:
    """Freeze a packed network and move it to ``device``.

    A call with gradient to its inputs raises ``UserError``, with ``where`` as the config's key.
    """
    network.requires_grad_(False)
    network.register_forward_pre_hook(partial(_refuse_gradient, where), with_kwargs=True)
    return network.to(device)


def _to_nf4(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight
    packed = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = Params4bit(
        weight.detach(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        module=packed,
    )
    packed.bias = layer.bias
    result: nn.Module = packed.to(weight.device)  # packs
    return result


def _to_int8(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _to_fp8(layer: nn.Linear) -> nn.Module:
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(layer, FLOAT8, layer.weight.dtype, skip_modules_pattern=())
    return layer


PACKERS = {"nf4": _to_nf4, "int8": _to_int8, "fp8_storage": _to_fp8}


def _refuse_gradient(where: str, network: nn.Module, inputs: Any, options: Any) -> None:
    given = [value for value in tree_leaves((inputs, options)) if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        raise UserError(
            f"{where}: a gradient would pass this network on its way to a trained one, and quantised matrices are for "
            f"networks that none passes; leave quantise out for this role"
        )
