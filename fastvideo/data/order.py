"""The order of samples: a pure function of (seed, epoch), disjoint between processes, resumable at any batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvideo.distillation.rng import seeded
from fastvideo.distillation.types import RawBatch, UserError


@dataclass(frozen=True)
class Shard:
    """This process's part of every epoch."""

    batch_size: int
    rank: int = 0
    world_size: int = 1


class SampleStream:
    """An endless, resumable stream of batches over captions and (where there are any) their latents.

    Every epoch is a new permutation; an incomplete last round of batches is left out of its epoch, so that all
    processes take the same number of steps.

    Args:
        captions: one per sample.
        latents: ``[N, C, F, H, W]``, normalised, or ``None`` for prompts alone.
        seed: of the order.
        shard: batch size, and which process this is.

    Raises:
        UserError: if there are fewer samples than one round of batches takes.
    """

    def __init__(self, captions: Sequence[str], latents: Tensor | None, seed: int, shard: Shard) -> None:
        per_round = shard.batch_size * shard.world_size
        if len(captions) < per_round:
            raise UserError(
                f"data: {len(captions)} samples are fewer than one batch of {shard.batch_size} on each of "
                f"{shard.world_size} processes"
            )
        self.captions, self.latents, self.seed, self.shard = captions, latents, seed, shard
        self.rounds = len(captions) // per_round
        self.epoch, self.round = 0, 0
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        return torch.randperm(len(self.captions), generator=seeded(self.seed * 1_000_003 + self.epoch))

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> RawBatch:
        """The next batch of this process."""
        if self.round == self.rounds:
            self.epoch, self.round = self.epoch + 1, 0
            self._order = self._permutation()
        start = (self.round * self.shard.world_size + self.shard.rank) * self.shard.batch_size
        index = self._order[start : start + self.shard.batch_size]
        self.round += 1
        latents = None if self.latents is None else self.latents[index]
        return RawBatch(tuple(self.captions[i] for i in index.tolist()), latents)

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"epoch": self.epoch, "round": self.round}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the batch after the last one of :meth:`state_dict`."""
        self.epoch, self.round = int(state["epoch"]), int(state["round"])
        self._order = self._permutation()


def read_prompts(path: str) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        UserError: if the file is not there, not text, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: cannot read prompts from {path!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"data.path: {path!r} has no prompt; one per line is expected")
    return prompts
