"""``LoRAFile``: an adapter as it was read from a file of any program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class LoRAFile:
    """Changes of a network's parameters, by their names in it.

    Attributes:
        source: file that they come from.
        factors: ``A`` ``[rank, in]`` and ``B`` ``[out, rank]`` of each layer, ``alpha / rank`` multiplied into ``B``.
        differences: whole changes of parameters.
    """

    source: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    differences: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """The factors in diffusers' names without a prefix."""
        named: dict[str, Tensor] = {}
        for layer, (down, up) in self.factors.items():
            named |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        return named
