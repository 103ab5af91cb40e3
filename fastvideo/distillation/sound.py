"""``Sound``: what some families make beside pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """Waveforms ``[B, channels, samples]`` in ``[-1, 1]``, float32, and their samples per second."""

    waveform: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        return self.waveform.shape[-1] / self.rate
