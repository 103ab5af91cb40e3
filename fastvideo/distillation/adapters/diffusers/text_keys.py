"""Keys and values of a prompt in cross-attention, computed once for the calls of a rollout.

They depend on the prompt and the weights alone. A commit keeps them beside the past, and later calls without gradient
read them. A rollout that ends in one backward pass shares those of its first call with gradient too, with their graph
(``Past.shared``): their projections run forward and backward once, for the sum of the calls' gradients. Like a view of
the past they travel as an argument, in the place of the text, so that nothing is kept on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.chunks import Past

Pair = tuple[Tensor, Tensor]
"""Keys and values ``[B, L, heads, D]`` of one layer."""


@dataclass(frozen=True, eq=False)
class TextKeys:
    """Keys and values of prompts in every layer.

    Attributes:
        text: the prompts, as the condition holds them.
        casts: computed under autocast.
        layers: one pair per layer; empty until the first call has made them.
    """

    text: Tensor
    casts: bool
    layers: list[Pair] = field(default_factory=list)

    def are_of(self, text: Tensor, casts: bool) -> bool:
        """True if a call on this text reads the same ones."""
        return self.text is text and self.casts == casts

    def detached(self) -> TextKeys:
        """The same ones, without their graph."""
        return TextKeys(self.text, self.casts, [(key.detach(), value.detach()) for key, value in self.layers])


def kept_keys(past: Past) -> TextKeys | None:
    """Keys for a call on a past: with their graph where gradients are enabled, and only shared ones then."""
    shared: TextKeys | None = (past.shared or {}).get(torch.is_grad_enabled())
    return shared if shared is not None or torch.is_grad_enabled() else past.texts


def share_keys(past: Past, keys: TextKeys) -> None:
    """Keep the keys of a finished call for all calls of its rollout; those with a graph for calls without one too."""
    if past.shared is None or past.shared.get(torch.is_grad_enabled()) is keys:
        return
    past.shared[torch.is_grad_enabled()] = keys
    past.shared[False] = keys.detached() if torch.is_grad_enabled() else keys


@dataclass(frozen=True, eq=False)
class TextInput:
    """Input of cross-attention in one call: the embedded text, or ``None`` where all layers' keys are known."""

    embedded: Tensor | None
    layers: list[Pair]

    def of(self, layer: int, make: Callable[[Tensor], Pair]) -> Pair:
        """Keys and values of a layer, which ``make`` makes of the embedded text, in the order of the layers."""
        if self.embedded is None:
            return self.layers[layer]
        pair = make(self.embedded)
        self.layers.append(pair)
        return pair


class ReadsText:
    """Mark of a processor of cross-attention that reads a :class:`TextInput`, and the number of its layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer


def reads_text(network: Any, blocks: str) -> bool:
    """True if every layer of cross-attention has the processor that the network was loaded with."""
    return all(isinstance(block.attn2.processor, ReadsText) for block in getattr(network, blocks))


@contextmanager
def knowing(network: nn.Module, embedder: str, keys: TextKeys | None) -> Iterator[None]:
    """Calls of the network inside read ``keys``, or make them; ``None`` changes nothing."""
    if keys is None:
        yield
        return
    module: nn.Module = network.get_submodule(embedder)
    embed, known = module.forward, bool(keys.layers)
    module.forward = lambda text: TextInput(None if known else embed(text), keys.layers)
    try:
        yield
    finally:
        del module.forward
