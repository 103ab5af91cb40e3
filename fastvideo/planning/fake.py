"""Fake tensors that stand for a run's: shapes without memory, what is alive of them, and worst-case decisions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch, Condition, RawBatch

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators that torch's counter has for other devices only."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = int(storage.nbytes())
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


class WorstCase(RandomStreams):
    """Decisions that change which forwards run are taken as given: the last of the choices, or the first."""

    longest = True

    def shared_index(self, high: int) -> int:
        return high - 1 if self.longest else 0


def fake_network(network: nn.Module, trained: bool) -> nn.Module:
    """``network``, from the meta device, with fake tensors for its own; called inside a ``FakeTensorMode``."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), trained)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def drop_gradients(network: nn.Module) -> None:
    """As reduce-scatter does: what stays of a gradient is counted with the role."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(drop)


def fake_text(conditioner: Conditioner, count: int) -> Condition:
    """The condition of ``count`` prompts."""
    width = conditioner.stored_shapes["text_embedding"][-1]
    stored = torch.empty(count, conditioner.text_length or 1, width or 1)
    return conditioner.text_of(RawBatch(("",) * count, None, {"text_embedding": stored}))


def fake_batch(config: Config, adapter: Adapter) -> Batch:
    """One micro-batch, with latents if the method trains on them."""
    count, with_latents = config.data.batch_size, load_method(config.distill_method).uses_latents(config.method)
    conditioner, shape = adapter.conditioner, adapter.codec.latent_shape
    latents = torch.empty(count, *shape)
    first = Condition({})
    if conditioner.needs_frames:
        shapes = {name: [size or 1 for size in shape] for name, shape in conditioner.stored_shapes.items()}
        extras = {name: torch.empty(count, *shape) for name, shape in shapes.items()}
        first = conditioner.first_frames_of(RawBatch(("",) * count, latents, extras))
    return Batch(
        shape=(count, *shape),
        condition=fake_text(conditioner, count) | first,
        negative=conditioner.negative(count) | first,
        x0=latents if with_latents else None,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels chosen by the number of threads must not differ between a laptop and a server."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
