"""One optimizer and one lr schedule per trainable role."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Protocol

import torch
from torch import nn
from torch.optim import AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.sharding import local


class OptimizerOptions(Protocol):
    """What :func:`attach_optimizer` reads."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def kind(self) -> Literal["adamw", "radam"]: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int: ...


def attach_optimizer(handle: RoleHandle, options: OptimizerOptions) -> None:
    """Give a trainable role its optimizer and the schedule that moves with it.

    The fused kernels of AdamW can leave out a step on the word of a tensor, so that a step which is not finite costs no
    wait; RAdam has none, and the host waits to know.
    """
    handle.optimizer = _optimizer(handle.parameters(), options)
    handle.lr_scheduler = LambdaLR(handle.optimizer, partial(warmup_cosine, options.warmup_steps, options.decay_steps))


def _optimizer(parameters: list[nn.Parameter], options: OptimizerOptions) -> Optimizer:
    rate, betas, decay = options.learning_rate, options.betas, options.weight_decay
    if options.kind == "radam":
        return RAdam(parameters, lr=rate, betas=betas, weight_decay=decay, decoupled_weight_decay=True)
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
    if handle.optimizer is None:
        return None
    moved = weight = 0.0
    for group in handle.optimizer.param_groups:
        for p in group["params"]:
            state = handle.optimizer.state.get(p, {})
            if "exp_avg_sq" not in state or not float(state["step"]):
                continue
            bias, bias_sq = (1 - beta ** float(state["step"]) for beta in group["betas"])
            root = (local(state["exp_avg_sq"]) / bias_sq).sqrt() + group["eps"]
            moved += float((group["lr"] * local(state["exp_avg"]) / bias / root).double().square().sum())
            weight += float(local(p).double().square().sum())
    return math.sqrt(moved / weight) if weight else None
