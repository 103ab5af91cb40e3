"""A role's weights into another's, such as a student's that is the next teacher (progressive distillation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.errors import UserError


@runtime_checkable
class _Gathers(Protocol):
    """A block that holds a gathered copy of its shards after a call (FSDP2)."""

    def reshard(self) -> None: ...


@torch.no_grad()
def copy_role(source: RoleHandle, target: RoleHandle) -> None:
    """Give ``target`` the present weights of ``source``, in place; its optimizer and averages stay.

    Sharded networks are copied shard by shard. ``target`` is one of the method's ``trainable_roles``, which checkpoints
    hold, and need be in no ``active_roles``. Call it before the step's first network call.

    Raises:
        UserError: for a frozen target, for an adapter and a network that is whole, or networks that differ.
    """
    what = f"copy of role {source.name!r} to {target.name!r}"
    if not target.trainable:
        raise UserError(
            f"{what}: {target.name} is frozen, and no checkpoint would hold its new weights; name it in the method's "
            f"trainable_roles (active_roles may leave it out)"
        )
    if source.shares_network != target.shares_network:
        whole, adapted = (target, source) if source.shares_network else (source, target)
        raise UserError(
            f"{what}: {adapted.name} trains a LoRA adapter, and {whole.name} a whole network; train both alike: leave "
            f"out roles.{adapted.name}.lora, or give roles.{whole.name}.lora too"
        )
    new, old = _weights(source), _weights(target)
    if wrong := sorted(name for name in new.keys() | old.keys() if _shape(new, name) != _shape(old, name)):
        raise UserError(f"{what}: their networks differ in {len(wrong)} tensors, such as {wrong[0]}")
    for name, weight in old.items():
        weight.copy_(new[name])


def _weights(role: RoleHandle) -> Mapping[str, Tensor]:
    """Live tensors by name; shards of a sharded network, whose blocks drop what their last call gathered."""
    for module in role.network.modules():
        if isinstance(module, _Gathers):
            module.reshard()
    return role.named_parameters() if role.shares_network else role.network.state_dict()


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None
