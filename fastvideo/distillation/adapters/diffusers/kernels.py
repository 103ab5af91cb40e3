"""Kernels behind the attention backends: torch's choice, a trial of any other, and the operations of foreign ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from fastvideo.distillation.adapters.diffusers.attention import NATIVE
from fastvideo.errors import UserError

KERNELS = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.OVERRIDEABLE: "the device's own",
}
"""Kernels of torch's scaled dot product attention, for people."""
TOKENS = 1024
"""Tokens of the call that torch is asked about: a video has thousands."""
COUNTED = ("native", "flex", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends of torch itself, whose operations its counter knows."""
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)
"""Errors by which libraries refuse a device, a dtype or a width, or are missing."""


def native_kernel(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Name of the kernel that torch chooses on a device for training with heads of this width; nothing is computed."""
    query = torch.empty(1, 2, TOKENS, width, dtype=dtype, device=device, requires_grad=True)
    choice: int = torch._fused_sdp_choice(query, query, query)
    return KERNELS[SDPBackend(choice)] + (" (CPU)" if device.type == "cpu" else "")


def attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of ``[B, L, heads, D]`` by a backend of diffusers' dispatcher."""
    from diffusers.models import attention_dispatch as dispatch

    backend = dispatch.AttentionBackendName(name)
    dispatch._check_attention_backend_requirements(backend)
    dispatch._maybe_download_kernel_for_backend(backend)
    mixed: Tensor = dispatch.dispatch_attention_fn(query, key, value, backend=backend)
    return mixed


@cache
def check_kernel(name: str, width: int, dtype: torch.dtype, device: torch.device, *, trained: bool) -> None:
    """Compute a little attention with a backend other than torch's own choice, and with ``trained`` its gradients.

    Libraries check little: a kernel for inference may return an answer without a gradient, and a training would go on
    around attention without a word.

    Raises:
        UserError: if the backend does not take heads of that width in that dtype on that device, or cannot be trained.
    """
    if name == NATIVE:
        return
    kind = f"heads of width {width} in {str(dtype).removeprefix('torch.')} on {device.type}"
    query, key, value = (
        torch.ones(1, TOKENS, 2, width, dtype=dtype, device=device, requires_grad=trained) for _ in range(3)
    )
    try:
        answer = attend(name, query, key, value)
        if trained and answer.requires_grad:
            answer.sum().backward()  # type: ignore[no-untyped-call]
    except REFUSALS as error:
        verb, reason = "train" if trained else "compute", str(error).partition("\n")[0].rstrip(".")
        raise _refused(name, f"does not {verb} {kind} ({reason})") from error
    if answer.dtype != dtype:
        raise _refused(name, f"answers {kind} in {answer.dtype}")
    if trained and any(x.grad is None for x in (query, key, value)):
        raise _refused(name, "gives no gradient, so it cannot train")


def _refused(name: str, why: str) -> UserError:
    return UserError(f"model.attention_backend {name!r} {why}; choose another, such as {NATIVE!r}")


@contextmanager
def counting(add: Callable[[int], None]) -> Iterator[None]:
    """Give ``add`` the operations of all attention by kernels of other libraries, as of torch's own; backward too."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    stock = dict(Registry._backends)
    others = {backend: kernel for backend, kernel in stock.items() if backend.value not in COUNTED}
    Registry._backends.update({backend: partial(_counted, kernel, add) for backend, kernel in others.items()})
    try:
        yield
    finally:
        Registry._backends.update(stock)


def _counted(kernel: Callable[..., Any], add: Callable[[int], None], **given: Any) -> Any:
    """A call of a kernel ``[B, L, heads, D]``; of the tokens and heads of several processes, this one's part."""
    query, key, value = (given[name].transpose(1, 2).shape for name in ("query", "key", "value"))
    split = given.get("_parallel_config")
    times = 1 if split is None else _processes(split.context_parallel_config)
    add(times * sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
    answer = kernel(**given)
    if answer.requires_grad:
        backward = times * sdpa_backward_flop_count(query, query, key, value)  # type: ignore[no-untyped-call]
        answer.register_hook(lambda _: add(backward))
    return answer


def _processes(context: Any) -> int:
    return int(context.ring_degree * context.ulysses_degree)
