"""Resident bytes: memory that roles hold from step to step, from the shapes of their networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.optional.eight_bit import moment_bytes
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import States, own_training
from fastvideo.errors import UserError
from fastvideo.files import gib

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
class RoleBytes:
    """One role on the process that has the most of it.

    Attributes:
        parameters: number of elements of the network's own parameters, all processes together.
        weights: bytes of the parameters that are counted here, and of the adapter.
        tables: bytes of buffers.
    """

    name: str
    trainable: bool
    parameters: int
    weights: int
    tables: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All that stays from step to step, and the gradients."""
        return self.weights + self.tables + self.gradients + self.optimizer + self.average


def holders(handles: Iterable[RoleHandle]) -> dict[nn.Module, str]:
    """Name of the role that each network is counted for: of several roles over one, the first that is frozen."""
    found: dict[nn.Module, str] = {}
    for handle in sorted(handles, key=lambda handle: handle.trainable):
        found.setdefault(handle.network, handle.name)
    return found


def own_parameters(handle: RoleHandle, module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module of a role's network, without adapters."""
    return [p for p in module.parameters() if not (handle.shares_network and p.requires_grad)]


def role_bytes(
    handle: RoleHandle,
    shard: int,
    states: States,
    *,
    holds: bool = True,
    packed: Mapping[Tensor, int] | None = None,
    idle: str | None = None,
) -> RoleBytes:
    """Bytes of a role whose network is whole, or without weights, where ``shard`` processes hold it together.

    Args:
        holds: count the network itself, and not its adapter alone.
        packed: bytes of parameters that are stored in another way; such a network is never split.
        idle: name of the expert that no loss reaches (``experts.idle_expert_of``).
    """
    packed = packed or {}
    shard = 1 if packed else shard
    own, trained = own_parameters(handle, handle.network), handle.named_parameters()
    kept = [*(own if holds else ()), *(trained.values() if handle.shares_network else ())]
    training = own_training(handle)
    averages = [] if training is None else [training.ema or {}, *training.powers.values()]
    moving = [p for name, p in trained.items() if not (idle and name.startswith(f"{idle}."))]
    return RoleBytes(
        name=handle.name,
        trainable=handle.trainable,
        parameters=sum(p.numel() for p in own),
        weights=sum(packed.get(p, local_numel(p, shard) * p.element_size()) for p in kept),
        tables=sum(b.nbytes for b in handle.network.buffers()) * holds,
        gradients=sum(local_numel(p, shard) * FLOAT32 for p in moving),
        # torch makes moments with a parameter's first gradient, 8-bit ones are made for all before the first step.
        optimizer=optimizer_bytes(trained.values() if states == "8bit" else moving, shard, states),
        average=sum(
            local_numel(a, shard if n in trained else 1) * a.element_size() for one in averages for n, a in one.items()
        ),
    )


def check_memory(
    handles: Sequence[RoleHandle],
    processes: Processes,
    states: States,
    packed: Mapping[str, Mapping[Tensor, int]],
    idle: str | None,
) -> None:
    """Check that a device holds the roles' weights, gradients and optimizers; tables and activations come on top.

    Args:
        handles: roles over networks without weights.
        packed: by role, bytes of the parameters that are stored in another way.
        idle: as for :func:`role_bytes`.

    Raises:
        UserError: with each role's need, and the ``shard`` that would fit.
    """
    memory, shard, counted_for = processes.memory, processes.shard, holders(handles)

    def of_roles(degree: int) -> dict[str, int]:
        rows = [
            role_bytes(h, degree, states, holds=counted_for[h.network] == h.name, packed=packed.get(h.name), idle=idle)
            for h in handles
        ]
        return {row.name: row.total - row.tables for row in rows}

    def needed(degree: int) -> int:
        return sum(of_roles(degree).values())

    if memory is None or needed(shard) <= memory:
        return
    listed = ", ".join(f"{n} {gib(b)}" for n, b in sorted(of_roles(shard).items(), key=lambda row: -row[1]) if b)
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
