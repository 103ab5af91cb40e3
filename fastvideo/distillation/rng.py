"""Random streams: the only source of draws.

``local`` draws tensors and differs per data rank. ``shared``, equal on all ranks, decides which forwards run, so that
sharded forwards cannot hang. Checkpoints hold both.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator with its own state."""
    return torch.Generator(device=device).manual_seed(seed)


Purpose = Literal["noise", "noise of a resumed run", "decisions", "order", "heads", "adapter"]
"""Uses of a run's seed: tensors of a data rank, shared decisions, the order of an epoch, first weights."""


def stream_seed(seed: int, purpose: Purpose, *index: int) -> int:
    """A 64-bit seed for one stream of a run: no two of (seed, purpose, index) have a stream in common.

    Args:
        seed: the run's.
        purpose: use of the stream.
        index: which of several: a rank, an epoch; as many numbers for each stream of a purpose.
    """
    return mixed(zlib.crc32(purpose.encode()), *index, seed % 2**64)


def mixed(*entropy: int) -> int:
    """64-bit seed of several numbers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def normal(
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


MARGIN = 1e-4
"""Distance that draws on one side keep from its edge, above the rounding of float32."""


class RandomStreams:
    """Streams of one process: of data rank ``rank`` (one for all context-parallel ranks) of ``ranks``."""

    def __init__(self, seed: int, *, rank: int = 0, ranks: int = 1, device: torch.device | str = "cpu") -> None:
        self.seed, self.device, self.rank, self.ranks = seed, torch.device(device), rank, ranks
        self.local = seeded(stream_seed(seed, "noise", rank), self.device)
        self.shared = seeded(stream_seed(seed, "decisions"))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise; differs per data rank, like every draw without ``shared`` in its name."""
        return normal(shape, self.local, self.device, dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise with the shape and dtype of ``x``."""
        return self.normal(tuple(x.shape), x.dtype)

    def uniform(self, count: int) -> Tensor:
        """Float32 ``[count]`` in ``[0, 1)``."""
        return torch.rand(count, generator=self.local, device=self.device, dtype=torch.float32)

    def index(self, count: int, high: int) -> Tensor:
        """Int64 ``[count]`` in ``0..high - 1``."""
        return torch.randint(high, (count,), generator=self.local, device=self.device)

    def choice(self, count: int, shares: Sequence[float]) -> Tensor:
        """Int64 ``[count]``, each ``i`` with probability proportional to ``shares[i]``."""
        return torch.multinomial(torch.tensor(shares, device=self.device), count, True, generator=self.local)

    def shared_index(self, high: int) -> int:
        """Integer in ``0..high - 1``, equal on all ranks."""
        return int(torch.randint(high, (), generator=self.shared))

    def shared_uniform(self) -> float:
        """Number in ``[0, 1)``, equal on all ranks."""
        return float(torch.rand((), generator=self.shared))

    def shared_choice(self, shares: Sequence[float]) -> int:
        """Integer ``i`` with probability proportional to ``shares[i]``, equal on all ranks."""
        return int(torch.multinomial(torch.tensor(shares), 1, generator=self.shared))

    def on_one_side(self, count: int, share: float) -> Tensor:
        """:meth:`uniform` draws all above ``share``, or all below, equal on all ranks and as often as one would be."""
        u = self.uniform(count)
        if self.shared_uniform() >= share:
            return share + MARGIN + (1 - share - MARGIN) * u
        return (share - MARGIN) * u

    def state_dict(self) -> dict[str, Tensor]:
        """States of both generators and of torch's own (dropout)."""
        state = {"local": self.local.get_state(), "shared": self.shared.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["torch_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.local.set_state(state["local"])
        self.shared.set_state(state["shared"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["torch_cuda"], self.device)

    def load_foreign_state(self, state: Mapping[str, Tensor], step: int) -> str:
        """Load the main rank's state of a run in another layout; returns a note of the inexact part.

        The shared stream continues exactly. Local streams belong to ranks, so new ones begin.
        """
        self.shared.set_state(state["shared"])
        self.local.manual_seed(stream_seed(self.seed, "noise of a resumed run", self.rank, step))
        return "tensors are drawn from new local streams"
