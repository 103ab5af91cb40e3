"""``Scaling``: rules by which the engine splits a family's networks, or holds them in less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

Quantise = Literal["int8", "nf4", "fp8_storage"]
"""Storage of a frozen network's matrices: eight bits per number, four, or an 8-bit float that is cast up for a call."""
Storage = Literal["int8", "nf4", "fp8_storage", "gguf"]
"""Storage of a frozen network's matrices: a kind of :data:`Quantise`, or the packed numbers of a ``.gguf`` file."""


def is_gguf(path: str | None) -> bool:
    """True for the path of a ``.gguf`` file, which may not exist."""
    return path is not None and path.lower().endswith(".gguf")


class StoredTensor(NamedTuple):
    """Place of a tensor on disk: a safetensors file and its name in there."""

    file: Path
    name: str


class Scaling(Protocol):
    """Networks of a family, for processes that share them."""

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The parts that are gathered, offloaded and recomputed one at a time: the repeated blocks, mostly."""
        ...

    def recompute(self, network: nn.Module, checkpoint: Callable[..., Any]) -> None:
        """Have every block called as ``checkpoint(block, *args)`` where there is gradient."""
        ...

    def matrices(self, network: nn.Module) -> Mapping[str, nn.Linear]:
        """Linear layers of the blocks by name, but for those that the family keeps in float32."""
        ...

    def check_packing(self, kind: Quantise, where: str) -> None:
        """Check that the package is there which :meth:`pack` needs.

        Raises:
            UserError: naming it; ``where`` is the config's key.
        """
        ...

    def pack(self, network: nn.Module, kind: Storage, device: torch.device, where: str) -> None:
        """Freeze a network, store its :meth:`matrices` in fewer bits, and move it to ``device``; calls with gradient to
        its inputs are refused."""
        ...

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        """Numbers that the processes of one sample ``(C, F, H, W)`` must divide, by name: attention heads, tokens.

        ``path`` is as for ``ModelFolder.load_network``.
        """
        ...

    def compute_directly(self, network: nn.Module) -> None:
        """Compute a network, all of whose matrices have the compute dtype when it is called, without autocast."""
        ...

    def split_tokens(self, network: nn.Module, mesh: Any) -> None:
        """Give each process of the mesh (dimensions ``ring`` and ``ulysses``) its part of every sample's tokens."""
        ...
