"""``RoleTraining``: optimizer, learning-rate schedule and averages of one trained role, which move together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.engine.optional.eight_bit import adamw_8bit, check_installed
from fastvideo.distillation.engine.parallel.sharding import free_gathered, local
from fastvideo.errors import UserError

States = Literal["float32", "8bit"]
"""Number format of AdamW's moments."""


@dataclass
class RoleTraining:
    """Trains one role.

    Attributes:
        ema: averages of ``tensors_of(handle)`` by name, for a role that has them; shards where those are shards.
        powers: averages under power functions by their deviation, and the updates that they count, if a run keeps any.
    """

    optimizer: Optimizer
    lr_scheduler: LRScheduler | None = None
    ema: dict[str, Tensor] | None = None
    powers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _schedule_before: tuple[dict[str, Any], list[float]] = field(default=({}, []), init=False, repr=False)

    def step(self, skip: Tensor | None = None) -> None:
        """Move optimizer and lr schedule together, then drop the gradients.

        Args:
            skip: float scalar on the device. Where it is 1 the optimizer changes nothing. The host may not know it yet,
                so the schedule moves anyway, and :meth:`undo` moves it back.
        """
        if skip is None or self.optimizer.defaults.get("fused"):  # fused kernels read the flag on the device
            self.optimizer.found_inf = None if skip is None else self._beside_parameters(skip)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(skip):  # waits for the device
            self.optimizer.step()
        if self.lr_scheduler is not None:
            self._schedule_before = self.lr_scheduler.state_dict(), [g["lr"] for g in self.optimizer.param_groups]
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _beside_parameters(self, skip: Tensor) -> Tensor:
        """The flag on the parameters' device. For those on the host it waits: torch's copy may be read too early."""
        return skip.to(self.optimizer.param_groups[0]["params"][0].device)

    def undo(self) -> None:
        """Undo the schedule's part of a :meth:`step` that the optimizer skipped."""
        if self.lr_scheduler is None:
            return
        state, rates = self._schedule_before
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @contextmanager
    def averaged(self, handle: RoleHandle) -> Iterator[None]:
        """Give the role its averaged weights inside; the live ones return, to the bit. Without averages it keeps them.

        Weights are exchanged in place: forwards inside are without gradient, and those with gradient begin afterwards.
        """
        if self.ema is None:
            yield
            return
        _exchange(handle, self.ema)
        try:
            yield
        finally:
            _exchange(handle, self.ema)

    def resume_schedule(self, state: Mapping[str, Any]) -> None:
        """Continue at the schedule's update of ``state``, with the rate that this run's own schedule has there."""
        if self.lr_scheduler is None:
            return
        self.lr_scheduler.load_state_dict(dict(state))
        if isinstance(self.lr_scheduler, LambdaLR):
            rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
            for group, (rate, factor) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(self.lr_scheduler.last_epoch)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])


def training_of(handle: RoleHandle) -> RoleTraining:
    """Training of a trained role.

    Raises:
        RuntimeError: for a frozen role.
    """
    if (training := own_training(handle)) is None:
        raise RuntimeError(f"role {handle.name!r} has no optimizer")
    return training


def own_training(handle: RoleHandle) -> RoleTraining | None:
    """Training of a role; ``None`` for a frozen one."""
    assert handle.training is None or isinstance(handle.training, RoleTraining)
    return handle.training


def tensors_of(handle: RoleHandle) -> dict[str, Tensor]:
    """Values that training changes, without graph: trained parameters, and the buffers of a network trained whole.

    They share memory with the network, and are what a checkpoint and an average hold of this role.
    """
    trained = handle.named_parameters()
    if handle.shares_network:
        return {name: parameter.detach() for name, parameter in trained.items()}
    state = handle.network.state_dict()
    if len(trained) == sum(1 for _ in handle.network.parameters()):
        return state
    return {name: state[name] for name in trained}


def check_states(states: States, optimizers: Mapping[str, OptimizerConfig]) -> None:
    """Check that the optimizers of all roles can keep their moments in this format.

    Raises:
        UserError: naming the role, or the extra to install.
    """
    if states == "float32":
        return
    for role, options in optimizers.items():
        if options.kind != "adamw":
            raise UserError(
                f"trainer.optimizer_states: {states} is for AdamW, the optimizer of {role} is {options.kind}; set "
                f"float32, or method.optimizer: adamw"
            )
    check_installed()


def attach_optimizer(handle: RoleHandle, options: OptimizerConfig, states: States = "float32") -> None:
    """Give a trainable role its optimizer and schedule.

    AdamW's fused kernels read the skip flag on the device. RAdam and 8-bit AdamW have no such kernels: the host waits.
    """
    optimizer = _optimizer(handle.parameters(), options, states)
    schedule = LambdaLR(optimizer, partial(warmup_cosine, options.warmup_steps, options.decay_steps))
    handle.training = RoleTraining(optimizer, schedule)


def _optimizer(parameters: list[nn.Parameter], options: OptimizerConfig, states: States) -> Optimizer:
    rate, betas, decay = options.learning_rate, options.betas, options.weight_decay
    if options.kind == "radam":
        return RAdam(parameters, lr=rate, betas=betas, weight_decay=decay, decoupled_weight_decay=True)
    if states == "8bit":
        return adamw_8bit(parameters, rate, betas, decay)
    return AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)


def warmup_cosine(warmup: int, decay: int, step: int) -> float:
    """Factor on the peak rate before optimizer step ``step``: linear up, then cosine to 0 (or constant)."""
    if step < warmup:
        return (step + 1) / warmup
    if decay == 0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / decay)))


@torch.no_grad()
def _exchange(handle: RoleHandle, averages: Mapping[str, Tensor]) -> None:
    free_gathered(handle.network)  # gathered blocks would keep the other weights
    for name, tensor in tensors_of(handle).items():
        average, live = local(averages[name]), local(tensor)
        kept = live.clone()
        live.copy_(average)
        average.copy_(kept)


@torch.no_grad()
def relative_update(handle: RoleHandle) -> float | None:
    """Size of the role's next step over that of its weights, both RMS; ``None`` before the first step.

    Reads Adam's moments alone, so repeated calls agree. Of sharded weights it measures this process's part.
    """
    if (training := own_training(handle)) is None:
        return None
    optimizer = training.optimizer
    moved = weight = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" not in state or not float(state["step"]):
                continue
            bias, bias_sq = (1 - beta ** float(state["step"]) for beta in group["betas"])
            mean, square = (local(state[name]).dequantize() for name in ("exp_avg", "exp_avg_sq"))
            root = (square / bias_sq).sqrt() + group["eps"]
            moved += float((group["lr"] * mean / bias / root).double().square().sum())
            weight += float(local(p).double().square().sum())
    return math.sqrt(moved / weight) if weight else None
