"""Shares of the ladder's steps in training, and their change over a run (LADD arXiv 2403.12015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import model_validator
from torch import Tensor

from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import UserError
from fastvideo.ranges import NonNegativeFloat, NonNegativeInt


class RungConfig(MethodConfig):
    """Options of a method that trains ladder steps unevenly."""

    rung_shares: tuple[NonNegativeFloat, ...] = ()
    """Share of training at each step of the ladder, the noisiest first; empty means equal shares."""
    early_rung_shares: tuple[NonNegativeFloat, ...] = ()
    """Shares during the first `early_rung_steps` steps of the run: low noise is the easier start."""
    early_rung_steps: NonNegativeInt = 0
    """Steps of the run (of any role) until `rung_shares` take over."""

    @model_validator(mode="after")
    def _stages(self) -> RungConfig:
        if bool(self.early_rung_shares) != bool(self.early_rung_steps):
            raise ValueError("early_rung_shares and early_rung_steps go together: set both, or neither")
        for name in ("rung_shares", "early_rung_shares"):
            shares = getattr(self, name)
            if shares and not any(shares):
                raise ValueError(f"{name}: at least one ladder step needs a share above 0, got {list(shares)}")
        return self


class Rungs:
    """Draws ladder steps by the shares in force.

    Raises:
        UserError: if the number of shares is not the ladder's length.
    """

    def __init__(self, config: RungConfig, ladder: Ladder, rng: RandomStreams) -> None:
        self.config, self.ladder, self.rng = config, ladder, rng
        for name, shares in (("rung_shares", config.rung_shares), ("early_rung_shares", config.early_rung_shares)):
            if shares and len(shares) != len(ladder):
                times = ", ".join(f"{t:g}" for t in ladder.times)
                raise UserError(f"method.{name}: {len(shares)} shares for a ladder of {len(ladder)} steps ({times})")

    def shares(self, step: int) -> Sequence[float]:
        """Shares in force at ``step`` of the run; empty means equal shares."""
        return self.config.early_rung_shares if step < self.config.early_rung_steps else self.config.rung_shares

    def stop(self, step: int) -> int:
        """Ladder index at which a simulated rollout stops, equal on all ranks."""
        shares = self.shares(step)
        return self.rng.shared_choice(shares) if shares else self.rng.shared_index(len(self.ladder))

    def times(self, count: int, step: int) -> Tensor:
        """Float32 ``[count]``: a ladder time per sample."""
        shares = self.shares(step)
        index = self.rng.choice(count, shares) if shares else self.rng.index(count, len(self.ladder))
        return torch.tensor(self.ladder.times, device=index.device)[index]
