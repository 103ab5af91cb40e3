"""Resident bytes: memory that roles hold from step to step, from the shapes of their networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastvideo.distillation.engine.optional.eight_bit import moment_bytes
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import States
from fastvideo.errors import UserError

FLOAT32 = 4
MOMENTS = 2
MOST_PROCESSES = 1024


def local_numel(tensor: Tensor, shard: int) -> int:
    """Elements of the first process's shard of a tensor, which is the largest."""
    if shard == 1 or tensor.ndim == 0:
        return tensor.numel()
    return math.ceil(tensor.shape[0] / shard) * math.prod(tensor.shape[1:])


def optimizer_bytes(parameters: Iterable[Tensor], shard: int, states: States) -> int:
    """AdamW's two moments and a step counter per parameter."""
    found = 0
    for p in parameters:
        own = local_numel(p, shard)
        found += MOMENTS * (moment_bytes(p.shape, own) if states == "8bit" else own * FLOAT32) + FLOAT32
    return found


@dataclass(frozen=True)
class ResidentBytes:
    """Memory of a network that stays on the device, from its parameters (on the meta device)."""

    parameters: Sequence[Tensor]
    trained: bool

    def of(self, shard: int, states: States) -> int:
        """Bytes of weights, and of gradients and optimizer if trained, on the process that has the most."""
        weights = sum(local_numel(p, shard) * p.element_size() for p in self.parameters)
        if not self.trained:
            return weights
        gradients = sum(local_numel(p, shard) * FLOAT32 for p in self.parameters)
        return weights + gradients + optimizer_bytes(self.parameters, shard, states)


def check_memory(roles: Mapping[str, ResidentBytes], processes: Processes, states: States) -> None:
    """Check that a device holds the resident bytes of the roles; activations and averages come on top.

    Raises:
        UserError: with each role's need, and the ``shard`` that would fit.
    """
    memory, shard = processes.memory, processes.shard
    if memory is None:
        return

    def needed(degree: int) -> int:
        return sum(role.of(degree, states) for role in roles.values())

    if needed(shard) <= memory:
        return
    of_roles = {name: role.of(shard, states) for name, role in roles.items()}
    listed = ", ".join(f"{name} {gib(of_roles[name])}" for name in sorted(of_roles, key=lambda n: -of_roles[n]))
    world = processes.world_size
    legal = [n for n in range(shard + 1, world + 1) if world % n == 0 and needed(n) <= memory]
    larger = [2**k for k in range(MOST_PROCESSES.bit_length()) if 2**k > world and needed(2**k) <= memory]
    hint = "no number of processes would do"
    if legal:
        hint = f"parallel.shard: {legal[0]} would do ({gib(needed(legal[0]))})"
    elif larger:
        hint = f"{larger[0]} such processes with parallel.shard: {larger[0]} would do ({gib(needed(larger[0]))})"
    raise UserError(
        f"parallel.shard: {shard} does not fit: weights, gradients and optimizer take {gib(needed(shard))} on each "
        f"process ({listed}), which has {gib(memory)} on {processes.device}; {hint}. What else helps: fastvideo plan "
        f"--config CONFIG --gpus {world}"
    )


def gib(value: float) -> str:
    """Bytes in a readable unit."""
    return f"{value / 2**30:.2f} GiB" if value >= 0.1 * 2**30 else f"{value / 2**20:.2f} MiB"
