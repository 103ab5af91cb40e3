"""Which rung of the ladder a student is trained at, and how that changes in the course of a run (LADD, 2403.12015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import UserError


class RungConfig(MethodConfig):
    """Options of a method that does not train all rungs alike."""

    rung_shares: tuple[NonNegativeFloat, ...] = ()
    """How often each rung of the ladder is trained, its first (noisiest) one first; empty: all alike."""
    early_rung_shares: tuple[NonNegativeFloat, ...] = ()
    """The same for the first `early_rung_steps` steps: the lower rungs are the easier ones to begin with."""
    early_rung_steps: NonNegativeInt = 0
    """Steps (of any role) before `rung_shares` hold."""

    @model_validator(mode="after")
    def _stages(self) -> RungConfig:
        if bool(self.early_rung_shares) != bool(self.early_rung_steps):
            raise ValueError("early_rung_shares and early_rung_steps go together: set both, or neither")
        for name in ("rung_shares", "early_rung_shares"):
            shares = getattr(self, name)
            if shares and not any(shares):
                raise ValueError(f"{name}: at least one rung needs a share above 0, got {list(shares)}")
        return self


class Rungs:
    """Draws rungs by the shares of the step.

    Args:
        config: the shares.
        ladder: the rungs.
        rng: where the draws come from.

    Raises:
        UserError: for shares of another number of rungs than the ladder has.
    """

    def __init__(self, config: RungConfig, ladder: Ladder, rng: RandomStreams) -> None:
        self.config, self.ladder, self.rng = config, ladder, rng
        for name, shares in (("rung_shares", config.rung_shares), ("early_rung_shares", config.early_rung_shares)):
            if shares and len(shares) != len(ladder):
                times = ", ".join(f"{t:g}" for t in ladder.times)
                raise UserError(f"method.{name}: {len(shares)} shares for a ladder of {len(ladder)} rungs ({times})")

    def shares(self, step: int) -> Sequence[float]:
        """Shares in force at ``step``; empty: all rungs alike."""
        return self.config.early_rung_shares if step < self.config.early_rung_steps else self.config.rung_shares

    def stop(self, step: int) -> int:
        """The index of one rung, the same on all ranks: where a simulated rollout stops."""
        shares = self.shares(step)
        return self.rng.shared_choice(shares) if shares else self.rng.shared_index(len(self.ladder))

    def times(self, count: int, step: int) -> Tensor:
        """Float32 ``[count]``: the time of a rung per sample."""
        shares = self.shares(step)
        index = self.rng.choice(count, shares) if shares else self.rng.index(count, len(self.ladder))
        return torch.tensor(self.ladder.times, device=index.device)[index]
