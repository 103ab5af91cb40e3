"""Exponential moving averages of trained weights, shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.config.averages import EMAConfig
from fastvideo.distillation.engine.optional.profiles import exponent_of
from fastvideo.distillation.engine.parallel.sharding import local
from fastvideo.distillation.engine.training import own_training, tensors_of, training_of


class EMAHook:
    """Updates ``handle.training.ema`` after each optimizer step of its role, and only then.

    Up to ``start_step`` the average is a copy of the live weights, so that the initial weights leave no trace. Every
    process averages its own shards.

    Args:
        student: role of the averages under power functions, if a run keeps any.
    """

    def __init__(
        self, handles: Sequence[RoleHandle], decay: float, start_step: int = 0, student: PowerAverages | None = None
    ) -> None:
        self.handles, self.decay, self.start_step, self.student = tuple(handles), decay, start_step, student
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
        if self.student is not None and self.student.handle.name in active:
            self.student.after_update(skip)


class PowerAverages:
    """Averages of a role under power functions of its updates (:mod:`..optional.profiles`), one for each deviation.

    They are exact: the weights after update ``u`` count with the profile's mass between ``u - 1`` and ``u``. Updates
    are counted on the device, as a skipped step is known there first.
    """

    COUNT = "updates"

    def __init__(self, handle: RoleHandle, stds: Sequence[float]) -> None:
        self.handle, self.exponents = handle, {f"{std:g}": exponent_of(std) for std in stds}
        tensors = tensors_of(handle)
        count = torch.zeros((), device=local(next(iter(tensors.values()))).device)
        training_of(handle).powers = {self.COUNT: {self.COUNT: count}} | {
            std: {name: tensor.detach().clone() for name, tensor in tensors.items()} for std in self.exponents
        }

    @torch.no_grad()
    def after_update(self, skip: Tensor) -> None:
        """Set ``average <- beta average + (1 - beta) weights``, beta = (1 - 1 / t) ** (exponent + 1) (equation 127)."""
        powers = training_of(self.handle).powers
        count = powers[self.COUNT][self.COUNT]
        taken = (1 - skip).to(count)
        count += taken
        left = torch.log1p(-1 / count.clamp(min=1))  # -inf at the first update: the initial weights leave no trace
        for std, exponent in self.exponents.items():
            _blend(powers[std], tensors_of(self.handle), -torch.expm1((exponent + 1) * left) * taken)


def keep_averages(bundle: ModelBundle, options: EMAConfig | None) -> EMAHook:
    """Begin the averages that a config asks for; of no role without one."""
    if options is None:
        return EMAHook((), 0.0)
    student = None if options.post_hoc is None else PowerAverages(bundle["student"], options.post_hoc.stds)
    roles = options.roles if options.enabled else ()
    return EMAHook([bundle[role] for role in roles], options.decay, options.start_step, student)


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
