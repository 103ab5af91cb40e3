"""The few-step ladder, and rollouts: from noise to clean latents, by the steps that training and sampling share.

A ladder holds the noise levels at which a student runs, as real times in ``(0, 1]``: published step lists and shifts
are converted once, when the config is read. Rollouts take a velocity function ``(x_t [B, C, F, H, W], t [B]) -> u``
with role and condition bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastvideo.distillation.noise import add_noise, full_time, velocity_to_x0
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import UserError

NoiseLike = Callable[[Tensor], Tensor]
SamplerKind = Literal["renoise", "euler", "flow_map"]


@dataclass(frozen=True)
class Ladder:
    """Decreasing times ``1 >= t_0 > t_1 > ... > t_{K-1} > 0``; the final 0 is implied.

    Raises:
        UserError: if the times are empty, not strictly decreasing, above 1 or not above 0.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        shown = list(self.times)
        if not self.times:
            raise UserError("ladder: at least one time is needed, for example [1.0, 0.75, 0.5, 0.25]")
        if self.times[0] > 1.0:
            steps = "give integer timesteps as `steps:` with their `shift:`"
            raise UserError(f"ladder {shown}: starts at {self.times[0]}, above 1 (pure noise); {steps}")
        if not all(math.isfinite(time) for time in self.times):
            raise UserError(f"ladder {shown}: every time must be a finite number")
        for high, low in zip(self.times, self.times[1:], strict=False):
            if low == high:
                raise UserError(f"ladder {shown}: repeats {low}; every time must be lower than the one before")
            if low > high:
                raise UserError(f"ladder {shown}: rises from {high} to {low}; times must decrease")
        if self.times[-1] <= 0.0:
            raise UserError(f"ladder {shown}: ends at {self.times[-1]}; the final 0 is implied, leave it out")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def with_end(self) -> tuple[float, ...]:
        """Times with the final 0."""
        return (*self.times, 0.0)


class Rungs:
    """Draws ladder steps by shares; with ``told`` it gives the second time of a critic that reads the latest one.

    Raises:
        UserError: if the number of shares is not the ladder's length; ``field`` of the method has them.
    """

    def __init__(self, shares: Sequence[float], ladder: Ladder, field: str = "rung_shares", told: bool = False) -> None:
        self.shares, self.ladder, self.told = tuple(shares), ladder, told
        self.latest: Tensor | float = ladder.times[-1]
        if shares and len(shares) != len(ladder):
            times = ", ".join(f"{t:g}" for t in ladder.times)
            raise UserError(f"method.{field}: {len(shares)} shares for a ladder of {len(ladder)} steps ({times})")

    def stop(self, rng: RandomStreams) -> int:
        """Ladder index at which a simulated rollout stops, equal on all ranks."""
        index = rng.shared_choice(self.shares) if self.shares else rng.shared_index(len(self.ladder))
        self.latest = self.ladder.times[index]
        return index

    def times(self, count: int, rng: RandomStreams) -> Tensor:
        """Float32 ``[count]``: a ladder time per sample."""
        index = rng.choice(count, self.shares) if self.shares else rng.index(count, len(self.ladder))
        self.latest = times = torch.tensor(self.ladder.times, device=index.device)[index]
        return times

    def second_time(self, t: Tensor) -> Tensor | None:
        """Times ``[B]`` below ``t`` by how much earlier than the ladder's last step the latest samples were made."""
        return t - (self.latest - self.ladder.times[-1]) if self.told else None


class Velocity(Protocol):
    """``u(x_t, t)``, or a flow map's mean velocity from ``t`` down to ``r``."""

    def __call__(self, x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor: ...


def start(noise: Tensor, t: float) -> Tensor:
    """The state at time ``t`` that stands for pure ``noise``: as large as a sample of unit variance would be there.

    It is the noise itself at ``t = 1``. Ladders of families that end short of pure noise start below.
    """
    return noise if t == 1.0 else math.hypot(1 - t, t) * noise


def renoise(velocity: Velocity, x: Tensor, times: Sequence[float], noise_like: NoiseLike) -> Tensor:
    """State at ``times[-1]`` of the stochastic ("SDE", consistency) sampler, without gradient.

    At each time but the last, ``x0 = x - t u`` and then ``x = (1 - t') x0 + t' noise`` with fresh noise.
    """
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            x0 = velocity_to_x0(x, velocity(x, full_time(x, t)), full_time(x, t))
            x = add_noise(x0, noise_like(x0), full_time(x0, after))
    return x


def few_step(velocity: Velocity, noise: Tensor, times: Sequence[float], noise_like: NoiseLike) -> Tensor:
    """Clean latents after ``len(times)`` calls from pure ``noise`` at ``times[0]`` (:func:`start`).

    Gradient flows through the last call only (DMD2's backward simulation, arXiv 2405.14867 section 4.5); under
    ``no_grad`` this is the student's sampler.
    """
    x = renoise(velocity, start(noise, times[0]), times, noise_like)
    t = full_time(x, times[-1])
    return velocity_to_x0(x, velocity(x, t), t)
