"""Cost of a run: seconds per step, samples and tokens per second, memory, FLOPs utilisation, time left."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from time import monotonic
from typing import Protocol

import torch

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.engine.optional.counting import Counter
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import NetworkSource
from fastvideo.distillation.types import RawBatch

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Published dense bfloat16 FLOP/s by a part of the device's name; the first match counts."""


def peak_of(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; ``None`` if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class LatentCodec(Protocol):
    """The part of a family's codec that says how large a sample is."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]: ...


class TokenSource(NetworkSource, Protocol):
    """The part of an adapter that counts the tokens of a sample, and operations that torch does not see."""

    @property
    def codec(self) -> LatentCodec: ...


COUNTED_STEPS = 8


class Performance:
    """Measures windows of steps, by the host's clock; hooks do not count.

    FLOPs are counted by torch's ``FlopCounterMode`` in ``COUNTED_STEPS`` steps of each set of active roles, after its
    first, and stand with their mean for the steps that follow, because a step's network calls are a matter of draws.
    They are counted only if the peak is known and no block is compiled. Matrix products, convolutions and attention
    count, recomputed ones too; attention by its formula where its kernel is another library's.

    Args:
        source: family of the networks, for tokens per sample and for such kernels; tokens are not measured without it.
        peak: FLOP/s of one device; ``None`` measures no utilisation.
    """

    def __init__(
        self, bundle: ModelBundle, processes: Processes, source: TokenSource | None, peak: float | None
    ) -> None:
        self.processes, self.source, self.peak = processes, source, peak or peak_of(processes.device)
        self._countable = self.peak is not None and not any(_is_compiled(handle.network) for handle in bundle)
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._tokens_of = lru_cache(self._count_tokens)
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps, self._samples, self._tokens = monotonic(), 0, 0, 0
        self._done = 0.0
        self._known = self._countable

    @contextmanager
    def step(self, active: tuple[str, ...]) -> Iterator[None]:
        """Surround the forward and backward passes of one step."""
        first = active not in self._counts
        counts = self._counts.setdefault(active, [])
        if first or not self._countable or len(counts) == COUNTED_STEPS:
            yield
            flops = sum(counts) / max(len(counts), 1)
        else:
            counter = Counter()
            with counter, of_folder(self.source.folder).counting(counter.add) if self.source else nullcontext():
                yield
            flops = counter.total
            counts.append(flops)
        self._steps, self._done = self._steps + 1, self._done + flops
        self._known = self._known and bool(counts)

    def saw(self, raw: RawBatch) -> None:
        """Count a micro-batch of this process."""
        self._samples += len(raw.captions)
        if self.source is not None:
            shape = self.source.codec.latent_shape if raw.latents is None else tuple(raw.latents.shape[1:])
            self._tokens += len(raw.captions) * self._tokens_of(shape)

    def _count_tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of one sample ``(C, F, H, W)``: patches if the family has them, else latent positions."""
        if self.source is None or self.source.scaling is None:
            return math.prod(shape[1:])
        return self.source.scaling.context_counts(None, shape)["tokens"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from the window."""
        begin = monotonic()
        yield
        self._since += monotonic() - begin

    def window(self, left: int) -> dict[str, float]:
        """Figures of the steps since the last call, of all processes; memory is this process's peak.

        Args:
            left: steps until the run ends.
        """
        if not self._steps:
            return {}
        seconds = monotonic() - self._since
        found = {
            "seconds_per_step": seconds / self._steps,
            "samples_per_second": self._samples * self.processes.data_size / seconds,
            "peak_memory_bytes": float(peak_memory(self.processes.device)),
            "seconds_left": left * seconds / self._steps,
        }
        if self._tokens:
            found["tokens_per_second"] = self._tokens * self.processes.data_size / seconds
        if self._known and self.peak is not None:
            found["flops_utilisation"] = self._done / seconds / self.peak
        self._begin()
        return {f"performance/{name}": value for name, value in found.items()}


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on a CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _is_compiled(network: torch.nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())


def shortly(figures: Mapping[str, float]) -> str:
    """Pace, for the text beside the bar."""
    pace = figures.get("performance/seconds_per_step")
    return "" if pace is None else f" {pace:.2f} s/step"
