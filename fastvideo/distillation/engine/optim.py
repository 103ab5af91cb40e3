"""One optimizer and one lr schedule per trainable role."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Protocol

from torch import nn
from torch.optim import AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from fastvideo.distillation.bundle import RoleHandle


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
