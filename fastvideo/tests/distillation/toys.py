"""Methods at toy size: analytic roles with known truth, a recording family, and a toy config per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.conformance.method_subject import LADDER, MEAN, STD, MethodSubject, backward
from fastvideo.conformance.method_subject import analytic_batch as analytic_batch
from fastvideo.conformance.method_subject import gaussian as gaussian
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.chunks import Context, Past
from fastvideo.distillation.engine.training import RoleTraining, training_of
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.trajectory import STATE_TIMES, STATES
from fastvideo.distillation.types import Batch, Condition, Given


@dataclass(frozen=True)
class Call:
    """One network evaluation, as the network saw it."""

    network: nn.Module
    with_grad: bool
    x_t: Tensor
    t: Tensor
    condition: Condition
    output: Tensor
    r: Tensor | None = None
    context: Context | None = None


@dataclass(frozen=True)
class Commit:
    """One chunk that was added to a past."""

    past: Past
    x0: Tensor
    condition: Condition
    t: float


class SpyAdapter(AnalyticAdapter):
    """The analytic family, remembering every call."""

    def __init__(self, config: AnalyticConfig) -> None:
        super().__init__(config)
        self.calls: list[Call] = []
        self.feature_calls: list[Call] = []
        self.commits: list[Commit] = []

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        output = super().velocity(network, x_t, t, condition, r=r, context=context)
        if output.requires_grad:
            output.retain_grad()
        self.calls.append(Call(network, torch.is_grad_enabled(), x_t, t, condition, output, r, context))
        return output

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        self.commits.append(Commit(past, x0, condition, t))
        return super().commit(network, past, x0, condition, t)

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[int],
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """A ``whole`` call counts among those of the velocity."""
        u, tokens = super().features(network, x_t, t, condition, taps, whole=whole)
        if not whole:
            self.feature_calls.append(Call(network, torch.is_grad_enabled(), x_t, t, condition, tokens[0]))
        return u, tokens

    def of(self, handle: RoleHandle) -> list[Call]:
        """The calls of one role."""
        return [call for call in self.calls if call.network is handle.network]

    def grad_modes(self, handle: RoleHandle) -> str:
        """One letter per call of a role: ``g`` with gradient, ``n`` without; calls for features alone come last."""
        calls = [*self.of(handle), *(call for call in self.feature_calls if call.network is handle.network)]
        return "".join("g" if call.with_grad else "n" for call in calls)


def spy(shape: tuple[int, int, int, int] = (1, 1, 4, 4)) -> SpyAdapter:
    """A recording analytic family whose truth is N(MEAN, STD^2)."""
    adapter = SpyAdapter(AnalyticConfig(means=(MEAN,), stds=(STD,), shape=shape))
    adapter.ensure_negative_conditioning()
    return adapter


def moments(handle: RoleHandle) -> tuple[float, float]:
    """Mean and standard deviation of a one-component network."""
    return float(handle.network.mean.detach()), float(handle.network.std.detach())


def trajectory_extras(states: Tensor) -> dict[str, Tensor]:
    """What a data source yields beside the latents for states ``[B, K, C, F, H, W]`` at the times of ``LADDER``."""
    return {STATES: states, STATE_TIMES: torch.tensor(LADDER.times).expand(len(states), -1)}


def with_given(batch: Batch, frames: int = 1) -> Batch:
    """The batch with its first latent frames given."""
    assert batch.x0 is not None
    mask = torch.zeros(len(batch), batch.shape[2], dtype=torch.bool)
    mask[:, :frames] = True
    given = Condition({}, Given(mask, batch.x0))
    return replace(batch, condition=batch.condition | given, negative=batch.negative | given)


def train(
    method: DistillMethod[Any],
    batches: Callable[[int], Batch],
    steps: int,
    rates: Mapping[str, float],
    *,
    final_rate: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.999),
) -> None:
    """A plain training loop: Adam with the given rates, decayed linearly to ``final_rate`` of them."""
    for role, rate in rates.items():
        handle = method.bundle[role]
        optimizer = torch.optim.Adam(handle.parameters(), lr=rate, betas=betas)
        averages = None if handle.training is None else handle.training.ema
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final_rate, steps)
        handle.training = RoleTraining(optimizer, schedule, averages)
    for step in range(steps):
        for loss in method.losses(batches(step), step):
            backward(method, loss)
        for role in method.active_roles(step):
            training_of(method.bundle[role]).step()


@dataclass(frozen=True)
class Toy:
    """The toy config of one method, and which exact network its student has."""

    config: Mapping[str, Any]
    student: str = "denoiser"
    optional: tuple[str, ...] = ()
    """Roles that the method can do without, and here has."""
    sampler: Ladder = LADDER
    """A ladder on which its sampler is exact for the exact student."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates that a game of two needs: the discriminator has to be quicker than the student."""


FLOW_MAP = {"fused_guidance": 1.0, "flow_time_shift": 1.0, "caption_dropout": 0.0, "balance": False}
"""AnyFlow's loss without what couples the samples of a batch."""

TOYS = {
    "kd": Toy({}, student="consistency", sampler=Ladder((1.0,))),
    "causal_kd": Toy({"allow_bidirectional_pairs": True}, student="consistency"),
    "cm": Toy({"teacher_guidance": 1.0, "ratio_base": 1000.0}, student="consistency", optional=("teacher",)),
    "tcm": Toy({"teacher_guidance": 1.0}, student="consistency", optional=("teacher",)),
    "causal_cd": Toy(
        {"teacher_guidance": 1.0, "grid_steps": 1000, "grid_shift": 1.0, "allow_bidirectional_teacher": True},
        student="consistency",
    ),
    "anyflow": Toy({"teacher_guidance": 1.0, **FLOW_MAP, "score_time_shift": 1.0}, student="mean_velocity"),
    "anyflow_pretrain": Toy(FLOW_MAP, student="mean_velocity"),
    "dmd2": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "causvid": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "self_forcing": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "streaming_tuning": Toy(
        {"teacher_guidance": 1.0, "generator_update_interval": 2, "first_frame": "keep", "max_frames": 3},
        student="consistency",
    ),
    "phased_dmd": Toy({"teacher_guidance": 1.0, "generator_update_interval": 1}, student="consistency"),
    "dmd2_frames": Toy(
        {
            "teacher_guidance": 1.0,
            "frame_guidance": 1.0,
            "generator_update_interval": 2,
            "frames_per_video": 1,
            "frame_warmup_steps": 0,
            "trust_frame_teacher": True,
        },
        student="consistency",
    ),
    "dmd2_gan": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "f_distill": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "ladd": Toy({"renoise_mean": 0.0}, student="consistency", rates={"student": 5e-4, "discriminator": 1e-2}),
    "mean_flow": Toy({"teacher_guidance": 1.0, "equal_times": 0.5}, student="mean_velocity", optional=("teacher",)),
    "rcm": Toy(
        {
            "teacher_guidance": 1.0,
            "generator_update_interval": 2,
            "consistency_steps": 1,
            "consistency_weight": 0.3,
            "tangent_warmup_steps": 0,
            "score_time_shift": 1.0,
        },
        student="consistency",
    ),
    "scm": Toy({"teacher_guidance": 1.0, "tangent_warmup_steps": 1}, student="consistency", optional=("teacher",)),
    "sft": Toy({"time_shift": 1.0, "caption_dropout": 0.5}, sampler=uniform_ladder(400)),
    "causal_sft": Toy({"time_shift": 1.0, "caption_dropout": 0.5}, sampler=uniform_ladder(400)),
}


def toy_of(name: str) -> Toy:
    """The toy config of a method; every registered method has one."""
    if name not in TOYS:
        pytest.fail(f"no toy config for {name} in toys.py: add a line to TOYS")
    return TOYS[name]


def subject_of(name: str, **options: Any) -> MethodSubject:
    """A registered method under examination, with its toy config."""
    toy = toy_of(name)
    return MethodSubject(load_method(name), {**toy.config, **options}, toy.student, toy.optional)


def toy_method(
    name: str,
    adapter: AnalyticAdapter,
    *,
    mean: float = MEAN,
    std: float = STD,
    rng: RandomStreams | None = None,
    **options: Any,
) -> DistillMethod[Any]:
    """A registered method on analytic roles: the truth, except that trained ones start at N(mean, std^2)."""
    return subject_of(name, **options).made(adapter, mean, std, rng)
