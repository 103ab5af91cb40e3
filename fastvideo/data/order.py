"""The order of samples: a pure function of (seed, epoch), disjoint between processes, resumable at any batch.

Rows come in **buckets** (one shape each: a batch never mixes them) and in **blocks** (what is read from disk at once).
Blocks are shuffled, then the rows of a few neighbouring ones, so that a block is read once per epoch and not once per
row; blocks of one row give a full shuffle. Every process owns one contiguous part of that order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from fastvideo.data.faults import Faults
from fastvideo.distillation.rng import seeded, stream_seed
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.wording import counted


@dataclass(frozen=True)
class Shard:
    """This process's part of every epoch."""

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def per_round(self) -> int:
        """Samples per step, all processes together."""
        return self.batch_size * self.world_size

    def why_skipped(self, rows: int) -> str:
        """Reason why an epoch skips some of a bucket's ``rows``; empty if it skips none."""
        if rows < self.per_round:
            return f"fewer than one step takes ({self.per_round})"
        left = rows % self.per_round
        return f"incomplete last step ({left} of {self.per_round}), others each epoch" if left else ""


@dataclass(frozen=True)
class Bucket:
    """Samples that may share a batch.

    ``rows`` int64 ``[N]`` are their numbers in the source, ascending; ``blocks`` int64 ``[N]`` the block that each is
    in, ``None`` where every row is one; ``window`` is how many blocks are shuffled into one another.
    """

    name: str
    rows: Tensor
    blocks: Tensor | None = None
    window: int = 1

    def rounds(self, shard: Shard) -> int:
        """Complete steps per epoch, the same number on all processes."""
        return len(self.rows) // shard.per_round

    def shuffled(self, generator: torch.Generator) -> Tensor:
        if self.blocks is None:
            return self.rows[torch.randperm(len(self.rows), generator=generator)]
        sizes = torch.unique_consecutive(self.blocks, return_counts=True)[1].tolist()
        blocks = torch.split(self.rows, sizes)
        order = torch.randperm(len(blocks), generator=generator).tolist()
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        mixed = []
        for window in windows:
            rows = torch.cat([blocks[i] for i in window])
            mixed.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(mixed)


class Source(Protocol):
    """Samples by number."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """All samples by shape."""

    def read(self, rows: Sequence[int]) -> RawBatch:
        """Samples by number, all of one bucket."""


@dataclass(frozen=True)
class MemorySource:
    """Samples in memory: captions, and optional latents ``[N, C, F, H, W]``, extras ``[N, ...]``, second captions."""

    captions: Sequence[str]
    latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    switches: Sequence[str] = ()

    @property
    def buckets(self) -> Sequence[Bucket]:
        return (Bucket("all", torch.arange(len(self.captions))),)

    def read(self, rows: Sequence[int]) -> RawBatch:
        index = torch.as_tensor(rows)
        latents = None if self.latents is None else self.latents[index]
        extras = {name: value[index] for name, value in self.extras.items()}
        switches = tuple(self.switches[i] for i in rows) if self.switches else ()
        return RawBatch(tuple(self.captions[i] for i in rows), latents, extras, switches)


class SampleStream:
    """An endless, resumable stream of batches.

    Every epoch is a new order with each sample at most once: it skips a bucket's incomplete last round (other samples
    each epoch). At every step all processes have batches of the same bucket.

    Args:
        source: the samples.
        seed: of the order.
        shard: batch size and rank.
        ahead: batches that a thread reads beforehand.
        pin: page-locked memory, for asynchronous copies to a CUDA device.
        faults: files and rows that the source skips.

    Raises:
        UserError: if no bucket has enough samples for one batch on each process.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        shard: Shard,
        ahead: int = 0,
        *,
        pin: bool = False,
        faults: Faults | None = None,
    ) -> None:
        self.source, self.seed, self.shard, self.ahead = source, seed, shard, ahead
        self.faults = Faults() if faults is None else faults
        self._load = partial(pinned, source) if pin else source.read
        self.rounds = sum(bucket.rounds(shard) for bucket in source.buckets)
        if not self.rounds:
            raise UserError(too_few([len(bucket.rows) for bucket in source.buckets], shard))
        self.epoch, self.round = 0, 0
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._reader = ThreadPoolExecutor(1, "reader") if ahead else None
        self._restart()

    def _plan_of(self, epoch: int) -> list[Tensor]:
        """This process's rows at every step of an epoch."""
        generator = seeded(stream_seed(self.seed, "order", epoch))
        steps: list[Tensor] = []
        for bucket in self.source.buckets:
            used = bucket.rounds(self.shard) * self.shard.per_round
            if used:
                own = bucket.shuffled(generator)[:used].view(self.shard.world_size, -1)[self.shard.rank]
                steps += own.split(self.shard.batch_size)
        if len(self.source.buckets) == 1:
            return steps
        return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]

    def _restart(self) -> None:
        self._upcoming = self._positions(self.epoch, self.round)
        self._queue: deque[Callable[[], RawBatch]] = deque()

    def _positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        while True:
            for i in range(step, self.rounds):
                yield epoch, i
            epoch, step = epoch + 1, 0

    def _read(self, epoch: int, step: int) -> Callable[[], RawBatch]:
        """Function that returns the batch of a position; a reader thread starts on it at once."""
        rows = self._plan(epoch)[step].tolist()
        if self._reader is None:
            return partial(self._load, rows)
        return self._reader.submit(self._load, rows).result

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> RawBatch:
        while len(self._queue) <= self.ahead:
            self._queue.append(self._read(*next(self._upcoming)))
        batch = self._queue.popleft()()
        more, self.round = divmod(self.round + 1, self.rounds)
        self.epoch += more
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch, and samples per step of all processes."""
        return {"epoch": self.epoch, "round": self.round, "per_round": self.shard.per_round}

    def rows_ahead(self, batches: int) -> list[int]:
        """The distinct samples of this process's next batches."""
        ahead = islice(self._positions(self.epoch, self.round), batches)
        rows: dict[int, None] = {}
        for epoch, step in ahead:
            rows |= dict.fromkeys(self._plan(epoch)[step].tolist())
        return list(rows)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of :meth:`state_dict`."""
        more, self.round = divmod(int(state["round"]), self.rounds)
        self.epoch = int(state["epoch"]) + more
        self._restart()

    def load_foreign_state(self, state: Mapping[str, int], step: int) -> str:
        """Continue a run of another number of processes at the same sample of the epoch; returns the inexact part."""
        seen = int(state["round"]) * int(state["per_round"])
        self.load_state_dict({**state, "round": -(-seen // self.shard.per_round)})
        return "the data go on at the same place of the epoch, divided anew among the processes"


def pinned(source: Source, rows: Sequence[int]) -> RawBatch:
    """Samples by number, in page-locked memory."""
    raw = source.read(rows)
    latents = None if raw.latents is None else raw.latents.pin_memory()
    extras = {name: value.pin_memory() for name, value in raw.extras.items()}
    return replace(raw, latents=latents, extras=extras)


def too_few(sizes: Sequence[int], shard: Shard) -> str:
    """Message for buckets without a complete step, with the batch size that fits."""
    needed = f"fewer than one batch of {shard.batch_size} on each of {counted(shard.world_size, 'process')}"
    largest = max(sizes, default=0)
    possible = largest // shard.world_size
    hint = f": set --data.batch-size to {possible}{' or less' if possible > 1 else ''}" if possible else ""
    if len(sizes) < 2:
        return f"data: {counted(largest, 'sample')} {'is' if largest == 1 else 'are'} {needed}{hint}"
    return f"data: the largest of {len(sizes)} buckets has {counted(largest, 'sample')}, {needed}{hint}"
