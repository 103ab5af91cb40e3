"""Metrics that stay on the device between log steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.distillation.engine.parallel.distributed import average


class Metrics:
    """Means since the last drain; one transfer and one all-reduce per log step, none in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Add one observation (a detached scalar tensor) of each name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """The mean of each name over its observations and over processes; starts a new window."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = [self._sums[name] / self._counts[name] for name in names]
        # Learning rates and a restored window are on the CPU, losses where the networks are.
        device = next((mean.device for mean in means if mean.device.type != "cpu"), means[0].device)
        averaged = average(torch.stack([mean.to(device) for mean in means]))
        self._sums, self._counts = {}, {}
        return dict(zip(names, averaged.tolist(), strict=True))

    def state_dict(self) -> dict[str, object]:
        """The open window."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue the window."""
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}
