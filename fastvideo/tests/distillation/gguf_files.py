"""Small .gguf files of Wan's networks, in the authors' names as converters of ComfyUI write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastvideo.distillation.adapters.export.wan import WanExporter
from fastvideo.tests.distillation.tiny import wan_config

Q6_K = 256
"""Numbers of a block of the kind Q6_K."""
ORIGINAL = WanExporter(wan_config(Path("tiny"))).original_name


def write_gguf(
    path: Path,
    network: nn.Module,
    kind_of: Callable[[str, Any], str],
    architecture: str = "wan",
    original_name: Callable[[str], str] = ORIGINAL,
) -> dict[str, str]:
    """Write a network.

    Args:
        kind_of: the kind of numbers of a tensor, by its name and values.

    Returns:
        Kind of each tensor by its name in the network.
    """
    import gguf

    writer, kinds = gguf.GGUFWriter(path, architecture), {}
    for name, tensor in network.state_dict().items():
        values = tensor.float().numpy()
        kind = kinds[name] = kind_of(name, values)
        original = original_name(name)
        if values.ndim > 4:  # more axes than the format has
            writer.add_array(f"comfy.gguf.orig_shape.{original}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        number = gguf.GGMLQuantizationType[kind]
        stored = six_bits(values) if kind == "Q6_K" else gguf.quants.quantize(values, number)
        writer.add_tensor(original, stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kinds


def six_bits(values: Any) -> Any:
    """Blocks of Q6_K: 16 groups of 16 numbers of six bits, with a scale of eight bits each, and one float16 for all.

    The package reads this kind and does not write it.
    """
    groups = values.reshape(-1, 16, 16)
    scales = np.abs(groups).max(-1) / 31
    unit = np.maximum(scales.max(-1) / 127, 1e-8).astype(np.float16)
    eighth = np.maximum(np.round(scales / unit[:, None].astype(np.float32)), 1)
    step = eighth[..., None] * unit[:, None, None].astype(np.float32)
    codes = (np.clip(np.round(groups / step), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    low = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2).reshape(-1, 128)
    high = (high << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2).astype(np.uint8).reshape(-1, 64)
    parts = [low, high, eighth.astype(np.int8).view(np.uint8), unit[:, None].view(np.uint8)]
    return np.concatenate(parts, -1).reshape(*values.shape[:-1], -1)
