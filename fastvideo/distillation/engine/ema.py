"""Exponential moving averages of trained weights, shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.config.averages import EMAConfig
from fastvideo.distillation.engine.parallel.sharding import local
from fastvideo.distillation.engine.training import own_training, tensors_of, training_of


class EMAHook:
    """Updates ``handle.training.ema`` after each optimizer step of its role, and only then.

    Up to ``start_step`` the average is a copy of the live weights, so that the initial weights leave no trace. Every
    process averages its own shards.
    """

    def __init__(self, handles: Sequence[RoleHandle], decay: float, start_step: int = 0) -> None:
        self.handles, self.decay, self.start_step = tuple(handles), decay, start_step
        for handle in self.handles:
            training_of(handle).ema = {name: tensor.detach().clone() for name, tensor in tensors_of(handle).items()}

    @torch.no_grad()
    def after_update(self, step: int, active: Sequence[str], skip: Tensor) -> None:
        """Set ``ema <- decay ema + (1 - decay) weights`` for every active role, unless ``skip`` (a scalar) is 1.

        A skipped step leaves the average as it is, to the bit: ``lerp`` with weight 0 returns its first argument.
        """
        decay = 0.0 if step < self.start_step else self.decay
        weight = (1 - decay) * (1 - skip)
        for handle in self.handles:
            averages = training_of(handle).ema
            if handle.name in active and averages is not None:
                _blend(averages, tensors_of(handle), weight)


def keep_averages(bundle: ModelBundle, options: EMAConfig | None) -> EMAHook:
    """Begin the averages that a config asks for; of no role without one."""
    if options is None or not options.enabled:
        return EMAHook((), 0.0)
    return EMAHook([bundle[role] for role in options.roles], options.decay, options.start_step)


def _blend(averages: Mapping[str, Tensor], tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    blended, live = list[Tensor](), list[Tensor]()
    for name, tensor in tensors.items():
        average, own = local(averages[name]), local(tensor)
        if average.is_floating_point():
            blended.append(average)
            live.append(own)
        else:
            average.copy_(own)
    if blended:
        weights = {key: weight.to(*key) for key in {(x.device, x.dtype) for x in blended}}
        torch._foreach_lerp_(blended, live, [weights[x.device, x.dtype] for x in blended])


def has_average(handle: RoleHandle) -> bool:
    """True if the role keeps averaged weights."""
    return (training := own_training(handle)) is not None and training.ema is not None
