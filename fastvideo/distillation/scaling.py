"""``Scaling``: what the engine needs of a family to hold its networks split, or with less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Scaling(Protocol):
    """Networks of a family, for processes that share them; ``path`` is as for ``DistillAdapter.load_network``."""

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """The network with parameters on the meta device, where they take no memory, and real buffers.

        Parameters have ``dtype``, but for those that the family keeps in float32.
        """
        ...

    def files(self, path: str | None) -> Mapping[str, Path]:
        """The safetensors file of each parameter, by its name.

        Raises:
            UserError: if the weights are not there as safetensors.
        """
        ...

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The parts that are gathered, offloaded and recomputed one at a time: the repeated blocks, mostly."""
        ...

    def recompute(self, network: nn.Module, checkpoint: Callable[..., Any]) -> None:
        """Have every block called as ``checkpoint(block, *args)`` where there is gradient."""
        ...

    def context_counts(self, path: str | None, latent_shape: Sequence[int], text_length: int) -> Mapping[str, int]:
        """What the processes that share one sample ``(C, F, H, W)`` must divide, by name: attention heads, tokens."""
        ...

    def split_tokens(self, network: nn.Module, mesh: Any) -> None:
        """Give each process of the mesh (dimensions ``ring`` and ``ulysses``) its part of every sample's tokens."""
        ...
