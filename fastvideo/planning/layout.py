"""Bytes that a process holds for each role, from the parameters' shapes: exact, without any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import ModelFolder
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.config.schema import RoleConfig
from fastvideo.distillation.engine.optional.footprint import FLOAT32, local_numel, optimizer_bytes
from fastvideo.distillation.engine.parallel.sharding import includes
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import initialising

GATHERED_BLOCKS = 2
"""Blocks of a split network that are whole at a time: the one that computes, and the next on its way."""


@dataclass(frozen=True)
class RoleBytes:
    """One role on one process."""

    name: str
    trainable: bool
    parameters: int
    """How many the whole network has."""
    weights: int
    gradients: int
    optimizer: int
    average: int
    block: int
    """Bytes of one repeated block, whole, in the compute dtype."""
    whole: int
    """Bytes of the whole network in the compute dtype."""

    @property
    def total(self) -> int:
        """All that stays from step to step, and the gradients."""
        return self.weights + self.gradients + self.optimizer + self.average


def role_bytes(config: Config, adapter: Adapter) -> list[RoleBytes]:
    """Every role's bytes on one process."""
    method = load_method(config.distill_method)
    with initialising(config.seed):
        networks = dict(method.heads(config.method, dict.fromkeys(config.roles, adapter)))
    own = set(networks)
    for name, role in config.roles.items():
        if name not in networks:
            assert adapter.scaling is not None
            dtype = torch.float32 if role.trainable and role.lora is None else adapter.folder.compute_dtype
            networks[name] = adapter.folder.empty(role.path, dtype)
            if name == "student" and "flow_map" in method.needs_of(config.method):
                adapter.folder.add_flow_map(networks[name])
    rows = [_role(config, adapter, name, networks[name], name in own) for name in config.roles]
    return [_adapted(config, row, networks[row.name]) for row in rows]


def _adapted(config: Config, row: RoleBytes, network: nn.Module) -> RoleBytes:
    """A role over a shared network: its adapter is its own, and the network is counted where it is first held."""
    role, sharing = config.roles[row.name], sharers(config, row.name)
    if not sharing:
        return row
    weights = row.weights if row.name == sharing[0] else 0
    if role.lora is None:
        return replace(row, weights=weights)
    shard, added = config.parallel.shard, list[Tensor]()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in role.lora.targets):
            added.append(torch.empty(role.lora.rank, module.in_features, device="meta"))
            added.append(torch.empty(module.out_features, role.lora.rank, device="meta"))
    size = sum(local_numel(part, shard) for part in added) * FLOAT32
    return replace(
        row,
        weights=weights + size,
        gradients=size,
        optimizer=optimizer_bytes(added, shard, config.trainer.optimizer_states),
        average=size * bool(row.average),
    )


def sharers(config: Config, name: str) -> list[str]:
    """The roles over one network that ``name`` is one of, the one it is counted for first; none if it has its own."""
    role = config.roles[name]
    adapted = [other.path for other in config.roles.values() if other.lora is not None]
    if not _shares(role, adapted):
        return []
    names = [n for n, other in config.roles.items() if other.path == role.path and _shares(other, adapted)]
    return sorted(names, key=lambda n: config.roles[n].trainable)


def _shares(role: RoleConfig, adapted: Sequence[str | None]) -> bool:
    return role.lora is not None or (not role.trainable and role.path in adapted)


def _role(config: Config, adapter: Adapter, name: str, network: nn.Module, own: bool) -> RoleBytes:
    shard, trainable = 1 if own else config.parallel.shard, config.roles[name].trainable
    parameters = list(network.parameters())
    elements = sum(local_numel(p, shard) for p in parameters)
    weights = sum(local_numel(p, shard) * p.element_size() for p in parameters)
    buffers = sum(b.numel() * b.element_size() for b in network.buffers())
    averaged = config.ema.enabled and name in averaged_roles(config)
    blocks = [] if own or adapter.scaling is None else adapter.scaling.blocks(network)
    item = adapter.folder.compute_dtype.itemsize
    return RoleBytes(
        name=name,
        trainable=trainable,
        parameters=sum(p.numel() for p in parameters),
        weights=weights + buffers,
        gradients=elements * FLOAT32 * trainable,
        optimizer=optimizer_bytes(parameters, shard, config.trainer.optimizer_states) * trainable,
        average=(elements * FLOAT32 + buffers) * averaged,
        block=max((_numel(block.parameters()) for block in blocks), default=0) * item,
        whole=_numel(parameters) * item,
    )


def averaged_roles(config: Config) -> tuple[str, ...]:
    """The roles whose average is kept."""
    return tuple(config.ema.roles)


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def stays_gathered(config: Config, role: RoleBytes) -> bool:
    """Whether a role's network is split, and whole from its first use to its last (in a step, if it is trained)."""
    return role.block > 0 and includes(config.parallel.keep_gathered, has_trained(config, role))


def has_trained(config: Config, role: RoleBytes) -> bool:
    """Whether anything of a role's network is trained, by this role or by one that shares it."""
    return role.trainable or any(config.roles[name].trainable for name in sharers(config, role.name))


def gathered_bytes(config: Config, roles: list[RoleBytes]) -> int:
    """What sharding holds beside the parts: blocks that are whole while they compute, and their gradients."""
    if config.parallel.shard == 1:
        return 0
    held = [role for role in roles if role.name == (sharers(config, role.name) or [role.name])[0]]
    whole = sum(role.whole for role in held if stays_gathered(config, role))
    largest = max(roles, key=lambda role: role.block)
    trained = max((role for role in roles if role.trainable), key=lambda role: role.block)
    unreduced = trained.block + 2 * trained.block  # in the compute dtype, and in float32 while it is reduced
    keeps = config.trainer.grad_accumulation > 1 and not config.parallel.sync_every_micro_batch
    if keeps:
        unreduced = sum(role.whole for role in roles if role.trainable)
    return whole + GATHERED_BLOCKS * largest.block + unreduced


def reduction_bytes(config: Config, roles: list[RoleBytes], world: int) -> int:
    """What averaging whole gradients over processes holds: all of one role's, joined."""
    if config.parallel.shard > 1 or world == 1:
        return 0
    return max(role.gradients for role in roles)


def frozen_parts(config: Config, folder: ModelFolder) -> Mapping[str, int]:
    """Text encoder (prompts are encoded while training), and the VAE where something is decoded; float32."""
    parts = folder.frozen_parts()
    used = parts if config.validation.every else [name for name in parts if name != "VAE"]
    return {name: _numel(parts[name].parameters()) * FLOAT32 for name in used}
