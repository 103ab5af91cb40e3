"""Attention of diffusers networks: the backend by its name, and the dtype of what it gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastvideo.errors import UserError
from fastvideo.wording import did_you_mean

NATIVE = "native"
"""Torch's scaled dot product attention, which every network and device has."""
MODELS = "diffusers.models.modeling_utils"
"""Logger of diffusers' networks."""
ATTENTION_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Modules that normalise queries and keys, by their names in diffusers' attention."""


def check_attention(name: str) -> None:
    """Check that diffusers' dispatcher has a backend of that name; its package may be missing here.

    Raises:
        UserError: with the nearest name.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(backend.value for backend in AttentionBackendName)
    if name not in known:
        raise UserError(f"model.attention_backend {name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")


def choose_attention(network: Any, name: str) -> None:
    """Give a network the attention backend of that name in diffusers' dispatcher.

    It is always set, so that neither a default nor the environment variable of diffusers decides instead.

    Raises:
        UserError: if there is no backend of that name, its package is missing, or the network cannot change its own.
    """
    check_attention(name)
    processors = [m.processor for m in network.modules() if "processor" in vars(m)] if name != NATIVE else []
    if any("_attention_backend" not in dir(processor) for processor in processors):
        raise UserError(
            f"model.attention_backend: {type(network).__name__} computes attention by itself, so only "
            f"{NATIVE!r} is possible, got {name!r}"
        )
    try:
        with without_warnings(MODELS):  # diffusers calls its dispatcher experimental each time
            network.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        raise UserError(f"model.attention_backend {name!r}: {error}") from error


def keep_dtype_of_attention(network: nn.Module) -> None:
    """Let the norms of queries and keys answer in the dtype of their input, which is that of the values.

    Autocast on CUDA computes norms in float32 and leaves their output so (``rms_norm`` since torch 2.12). Attention
    over several processes computes once more in backward, where no autocast makes them one; kernels take bfloat16.
    """
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in ATTENTION_NORMS:
            module.register_forward_hook(_in_dtype_of_input)


def _in_dtype_of_input(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(inputs[0].dtype)


@contextmanager
def without_warnings(logger_name: str) -> Iterator[None]:
    """Keep a library's warnings off the terminal, of what is checked here or chosen by name."""
    logger = logging.getLogger(logger_name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False
