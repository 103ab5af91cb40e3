"""Rates of a device: given, or measured here for a few seconds; attention has one of its own, by its backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.folder import DiffusersFolder
from fastvideo.distillation.adapters.diffusers.kernels import attend, check_kernel
from fastvideo.distillation.builder import Config, build_adapter
from fastvideo.distillation.features import widths_of

SECONDS = 2.0
"""Length of a measurement."""
ROWS = {"cpu": 1024, "cuda": 16384}
"""Rows of the products that are measured, and tokens of the attention."""
HEADS = 8


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of one process; ``attention``: operations per second of attention alone."""

    flops: float
    attention: float
    bandwidth: float


def measured_rates(config: Config, backend: str | None, bandwidth: float) -> Rates:
    """Rates of this machine on matrix products as wide as the network's, and on attention by a backend.

    Raises:
        UserError: for a backend that this machine does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = build_adapter(config)
    folder, width, rows = adapter.folder, widths_of(adapter)[0], ROWS[device.type]
    left = torch.ones(rows, width, device=device, dtype=folder.compute_dtype)
    right = torch.ones(width, 4 * width, device=device, dtype=folder.compute_dtype)
    attention = None
    if backend is not None and isinstance(folder, DiffusersFolder):
        check_kernel(backend, folder.head_width, folder.compute_dtype, device, trained=False)
        x = torch.ones(1, rows, HEADS, folder.head_width, device=device, dtype=folder.compute_dtype)
        attention = _rate(4 * rows * rows * HEADS * folder.head_width, lambda: attend(backend, x, x, x))
    flops = _rate(2 * rows * width * 4 * width, lambda: left @ right)
    return Rates(flops, attention or flops, bandwidth)


def _rate(operations: int, call: Callable[[], Tensor]) -> float:
    """Operations per second of calls one after another, after one that is not counted."""
    call().flatten()[0].item()
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        call().flatten()[0].item()
        rounds += 1
    return operations * rounds / (time.perf_counter() - start)
