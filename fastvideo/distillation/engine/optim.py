"""One optimizer and one lr schedule per trainable role."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.engine.optional.eight_bit import adamw_8bit, check_installed
from fastvideo.distillation.engine.parallel.sharding import local
from fastvideo.distillation.engine.training import RoleTraining
from fastvideo.errors import UserError

States = Literal["float32", "8bit"]
"""What AdamW keeps its moments in."""


def check_states(states: States, optimizers: Mapping[str, OptimizerConfig]) -> None:
    """Check that the optimizers of all roles can keep their state so.

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
    """Give a trainable role its optimizer and the schedule that moves with it.

    The fused kernels of AdamW can leave out a step on the word of a tensor, so that a step which is not finite costs no
    wait; RAdam and 8-bit AdamW have none, and the host waits to know.
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
def relative_update(handle: RoleHandle) -> float | None:
    """Size of the role's next step over that of its weights, both RMS; ``None`` before the first step.

    From Adam's moments, so it is the same however often it is asked for; of split weights, this process's part.
    """
    if handle.training is None:
        return None
    optimizer = handle.training.optimizer
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
