"""The order of samples: a pure function of (seed, epoch), disjoint between processes, resumable at any batch.

Rows come in **buckets** (one shape each: a batch never mixes them) and in **blocks** (what is read from disk at once).
Blocks are shuffled, then the rows of a few neighbouring ones, so that a block is read once per epoch and not once per
row; a block of one row is a full shuffle. Every process owns one contiguous part of that order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from fastvideo.data.faults import Faults
from fastvideo.distillation.rng import seeded, stream_seed
from fastvideo.distillation.types import RawBatch, UserError


@dataclass(frozen=True)
class Shard:
    """This process's part of every epoch."""

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def per_round(self) -> int:
        """Samples that all processes take in one step."""
        return self.batch_size * self.world_size


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
        """Steps per epoch: the incomplete last one is left out, so that all processes take the same number."""
        return len(self.rows) // shard.per_round

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The rows in a new order."""
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
        """All samples, by what may share a batch."""
        ...

    def read(self, rows: Sequence[int]) -> RawBatch:
        """The samples of those numbers, which are of one bucket."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """Samples that are in memory: captions, and latents ``[N, C, F, H, W]`` and extras ``[N, ...]`` where there are."""

    captions: Sequence[str]
    latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def buckets(self) -> Sequence[Bucket]:
        return (Bucket("all", torch.arange(len(self.captions))),)

    def read(self, rows: Sequence[int]) -> RawBatch:
        index = torch.as_tensor(rows)
        latents = None if self.latents is None else self.latents[index]
        extras = {name: value[index] for name, value in self.extras.items()}
        return RawBatch(tuple(self.captions[i] for i in rows), latents, extras)


class SampleStream:
    """An endless, resumable stream of batches.

    Every epoch is a new order, of which each sample is part at most once: a bucket's incomplete last round is left out
    (another one each epoch). At every step all processes have batches of the same bucket.

    Args:
        source: the samples.
        seed: of the order.
        shard: batch size, and which process this is.
        ahead: batches that a thread reads beforehand.
        faults: what the source leaves out.
        pin: put them into page-locked memory, from which a copy to a CUDA device waits for nothing.

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
            raise UserError(too_few(source.buckets, shard))
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
        """The batch of a position, to be called for; it is on its way if there is a thread for that."""
        rows = self._plan(epoch)[step].tolist()
        if self._reader is None:
            return partial(self._load, rows)
        return self._reader.submit(self._load, rows).result

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> RawBatch:
        """The next batch of this process."""
        while len(self._queue) <= self.ahead:
            self._queue.append(self._read(*next(self._upcoming)))
        batch = self._queue.popleft()()
        more, self.round = divmod(self.round + 1, self.rounds)
        self.epoch += more
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, and how many samples one round of all processes takes."""
        return {"epoch": self.epoch, "round": self.round, "per_round": self.shard.per_round}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the batch after the last one of :meth:`state_dict`."""
        more, self.round = divmod(int(state["round"]), self.rounds)
        self.epoch = int(state["epoch"]) + more
        self._restart()

    def load_foreign_state(self, state: Mapping[str, int], step: int) -> str:
        """Go on from a run with other processes, as many samples into the epoch; what is not exact then."""
        seen = int(state["round"]) * int(state["per_round"])
        self.load_state_dict({**state, "round": -(-seen // self.shard.per_round)})
        return "the data go on at the same place of the epoch, dealt anew to the processes"


def pinned(source: Source, rows: Sequence[int]) -> RawBatch:
    """The samples of those numbers in page-locked memory."""
    raw = source.read(rows)
    latents = None if raw.latents is None else raw.latents.pin_memory()
    return RawBatch(raw.captions, latents, {name: value.pin_memory() for name, value in raw.extras.items()})


def too_few(buckets: Sequence[Bucket], shard: Shard) -> str:
    """Why there is no step to take."""
    needed = f"fewer than one batch of {shard.batch_size} on each of {shard.world_size} processes"
    largest = max((len(bucket.rows) for bucket in buckets), default=0)
    if len(buckets) < 2:
        return f"data: {largest} samples are {needed}"
    return f"data: the largest of {len(buckets)} buckets has {largest} samples, {needed}"
