"""The part of a CUDA device that is Python: streams, events, and attention with the checks of its kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()
"""Calls of attention on the device, by dtype."""
_on_host = torch.nn.functional.scaled_dot_product_attention


class Event:
    """Done as soon as it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> Event:
        return self

    def synchronize(self) -> None: ...


class Stream(Event):
    """Takes no time."""

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> Event:
        return Event()


@contextmanager
def _in_stream(_: Any) -> Iterator[None]:
    yield


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as CUDA does it: cast under autocast, one dtype, a flash kernel for half precision."""
    if query.device.type != "cuda":
        return _on_host(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"Expected query, key, and value to have the same dtype, but got query.dtype: {query.dtype} "
            f"key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    CALLS[str(query.dtype).removeprefix("torch.")] += 1
    ops = torch.ops.aten
    if query.dtype == torch.float32 or attn_mask is not None:
        return ops._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, scale=scale)[0]  # type: ignore[no-any-return]
    return ops._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]  # type: ignore[no-any-return]


def pretend() -> None:
    """Put them in the places of torch's own, in this process."""
    stream = Stream()
    replaced: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "stream": _in_stream,
        "current_stream": lambda *_: stream,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "fake tensors",
        "is_bf16_supported": lambda *_, **__: True,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Event = Event  # type: ignore[misc, assignment]
    torch.amp.autocast_mode.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.nn.functional.scaled_dot_product_attention = attention
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host, then moved
