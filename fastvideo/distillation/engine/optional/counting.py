"""Floating point operations of a step: torch's counter, with the attention that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators that torch's counter has for other devices only."""


class _NoModules(ModuleTracker):
    """Counts for the whole step alone: the hooks of torch's own tracker keep all recomputed activations alive."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Counter(FlopCounterMode):
    """Counts matrix products, convolutions and attention, recomputed ones too; the total alone, not by module."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=CPU_ATTENTION)
        self.mod_tracker = _NoModules()
        self._told = 0

    def add(self, count: int) -> None:
        """Count operations that torch does not see, such as those of another library's kernel."""
        self._told += count

    @property
    def total(self) -> int:
        """Operations until now."""
        return int(self.get_total_flops()) + self._told

    @property
    def attention(self) -> int:
        """Those of attention among the ones that torch sees."""
        found = self.get_flop_counts()["Global"]
        return int(sum(count for operator, count in found.items() if "attention" in str(operator)))
