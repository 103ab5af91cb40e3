"""Total memory of a device, and settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from fastvideo.errors import UserError

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt`` (``malloc.h``)."""
KEEP = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 * 2**20, MMAP_MAX: 0}
"""No block has a mapping of its own, and the top of the heap is never returned."""
GIVE_BACK = {TRIM_THRESHOLD: 128 * 2**10, TOP_PAD: 0, MMAP_MAX: 65536}
"""Glibc's own defaults."""

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container under Linux; ``max`` for none."""


def total_memory(device: torch.device, sharing: int = 1) -> int | None:
    """Bytes of a CUDA device, or of the host for each of ``sharing`` processes on it; ``None`` if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32" or device.type != "cpu":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = LIMIT.read_text(encoding="utf-8").strip() if LIMIT.is_file() else "max"
    return min(total, int(limit) if limit.isdigit() else total) // sharing


def keep_freed_memory(keep: bool = True) -> None:
    """Let the C library keep the memory that CPU tensors free, instead of returning it to the system.

    By default every large tensor is a mapping of its own, which the system clears and takes back thousands of times per
    step. Kept memory is reused as it is.

    Args:
        keep: ``False`` restores the C library's defaults.

    Raises:
        UserError: on a system without glibc.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"trainer.keep_freed_memory is a setting of Linux's C library; this is {sys.platform}")
    library = ctypes.CDLL(None)
    try:
        set_option = library.mallopt
    except AttributeError as error:
        raise UserError("trainer.keep_freed_memory is a setting of glibc, which this system does not have") from error
    for option, value in (KEEP if keep else GIVE_BACK).items():
        if set_option(option, value) != 1:
            raise UserError(f"trainer.keep_freed_memory: the C library refused option {option} = {value}")
