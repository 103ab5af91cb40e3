"""Kernels of a diffusers network: its attention backend, and its blocks compiled or not."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastvideo.distillation.types import UserError

NATIVE = "native"
"""Torch's scaled dot product attention, which every network and device has."""


def choose_attention(network: Any, name: str) -> None:
    """Give a network the attention backend of that name in diffusers' dispatcher.

    It is always set, so that neither a default nor the environment variable of diffusers decides instead.

    Raises:
        UserError: if there is no backend of that name, its package is missing, or the network cannot change its own.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(backend.value for backend in AttentionBackendName)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.attention_backend {name!r} is not one of {', '.join(known)}{hint}")
    processors = network.attn_processors.values() if name != NATIVE else ()
    if any("_attention_backend" not in dir(processor) for processor in processors):
        raise UserError(
            f"model.attention_backend: {type(network).__name__} computes attention by itself, so only "
            f"{NATIVE!r} is possible, got {name!r}"
        )
    try:
        with _without_warnings("diffusers.models.modeling_utils"):
            network.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        raise UserError(f"model.attention_backend {name!r}: {error}") from error


@contextmanager
def _without_warnings(logger_name: str) -> Iterator[None]:
    """Diffusers calls its dispatcher experimental each time; a backend chosen by name needs no warning."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, which it lists as not to be split between devices."""
    names = set(network._no_split_modules or ())
    return [module for module in network.modules() if type(module).__name__ in names]


def compile_blocks(network: nn.Module) -> None:
    """Compile every repeated block in place: one graph serves all of a kind, in seconds instead of minutes.

    Names of parameters stay, and a copy of the network (its average, an export) is not compiled.
    """
    for block in repeated_blocks(network):
        block.compile()
