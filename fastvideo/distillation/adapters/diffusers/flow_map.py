"""A flow map's second time, for any network with a time embedding: no network is forked, no forward is copied.

:func:`add_head` hangs a small module under a network as ``flow_map_head``, so that it is trained, averaged, sharded and
checkpointed with it. :func:`reading` adds the module's output for ``t - r`` to the network's time embedding, for one
call. The output starts at zero and is always zero for ``r = t`` (the instantaneous velocity).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.types import UserError

HEAD = "flow_map_head"
"""Name of the module under its network, and in parameter names."""
HEAD_FILE = "flow_map_head.safetensors"
"""File of the head in a model folder: beside the pipeline's parts, which stock diffusers loads without it."""
FREQUENCIES = 8
"""Sines and cosines of ``pi (t - r) 2^k / 8``; the fastest has a period of 1/8."""


class FlowMapHead(nn.Module):
    """``(t - r) MLP(t - r)`` with a last layer of zeros (MeanFlow arXiv 2505.13447, section 4.3: embed t and t - r).

    Args:
        width: of the network's time embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.last = nn.Linear(width, width)
        # Every process starts from the same weights, whatever else was drawn before.
        nn.init.normal_(self.first.weight, std=FREQUENCIES**-0.5, generator=torch.Generator().manual_seed(0))
        for zero in (self.first.bias, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)

    def forward(self, span: Tensor) -> Tensor:
        """Addition to the time embedding, ``[..., width]``, for spans ``t - r`` of shape ``[...]``."""
        phase = span[..., None] * (math.pi / 8 * 2 ** torch.arange(FREQUENCIES, device=span.device))
        # A split network's weights are gathered in its compute dtype; spans themselves are float32.
        hidden = self.first(torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.first.weight.dtype))
        return span[..., None] * self.last(nn.functional.silu(hidden))  # type: ignore[no-any-return]


def head_of(network: nn.Module) -> nn.Module | None:
    """The head of a flow map; ``None`` for another network."""
    return dict(network.named_children()).get(HEAD)


def add_head(network: nn.Module, embedding: str) -> None:
    """Make a flow map of a network, which answers as before for every ``r``; one that has a head keeps it.

    Args:
        embedding: the module whose output is the time embedding, by its name in the network.
    """
    if head_of(network) is not None:
        return
    layers = [m for m in network.get_submodule(embedding).modules() if isinstance(m, nn.Linear)]
    head = FlowMapHead(layers[-1].out_features)
    # A network on the meta device gets its weights later; the head has its own already.
    network.add_module(HEAD, head if layers[0].weight.is_meta else head.to(layers[0].weight.device))


@contextmanager
def reading(network: nn.Module, embedding: str, span: Tensor | None) -> Iterator[None]:
    """Calls of the network inside see ``span`` = ``t - r``, in the shape of its times; ``None`` adds nothing.

    Raises:
        UserError: if the network has no head.
    """
    if span is None:
        yield
        return
    head = head_of(network)
    if head is None:
        raise UserError("this network is not a flow map: it has no flow_map_head, so it has no use for r")

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + head(span).view(output.shape).type_as(output)  # type: ignore[no-any-return]

    with network.get_submodule(embedding).register_forward_hook(add):
        yield


@contextmanager
def without_head(network: nn.Module) -> Iterator[nn.Module | None]:
    """The head, taken off its network inside the block: stock diffusers knows what is saved there."""
    head = head_of(network)
    if head is not None:
        delattr(network, HEAD)
    try:
        yield head
    finally:
        if head is not None:
            network.add_module(HEAD, head)


def save_head(head: nn.Module, folder: Path) -> None:
    """Write the head into a model folder."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(state, folder / HEAD_FILE, metadata={"format": "pt"})


def load_head(network: nn.Module, embedding: str, folder: Path) -> None:
    """Give the network the head of a model folder, where it holds one.

    Raises:
        UserError: if the file does not fit the network.
    """
    from safetensors.torch import load_file

    if not (folder / HEAD_FILE).is_file():
        return
    add_head(network, embedding)
    try:
        network.get_submodule(HEAD).load_state_dict(load_file(folder / HEAD_FILE))
    except RuntimeError as error:
        raise UserError(f"{folder / HEAD_FILE} does not fit the network beside it: {error}") from error
