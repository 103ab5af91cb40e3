"""Context parallelism: the processes of one group share a sample, each with a part of its tokens.

Outside a network nothing is split: every process of the group has the whole sample and gets the whole prediction.
Inside, diffusers splits the tokens, exchanges heads for tokens around attention (Ulysses, arXiv 2309.14509) and gathers
the prediction at the end. A process's parameter gradients are those of its tokens, so they add up over the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.distillation.engine.parallel.distributed import Processes, limit_waits, make_mesh
from fastvideo.distillation.scaling import Scaling
from fastvideo.errors import UserError


def check_context(processes: Processes, counts: Mapping[str, int], where: str) -> None:
    """Check that the processes of one sample can share ``counts`` evenly.

    Raises:
        UserError: with the possible values of ``parallel.context``.
    """
    wrong = [f"{name} ({count})" for name, count in counts.items() if count % processes.context]
    if wrong:
        sizes = (processes.world_size, *counts.values())
        legal = [n for n in range(1, processes.world_size + 1) if not any(size % n for size in sizes)]
        raise UserError(
            f"parallel.context: {processes.context} does not divide {' and '.join(wrong)} of {where}; possible with "
            f"{processes.world_size} processes: {', '.join(map(str, legal))}"
        )


def context_mesh(processes: Processes) -> DeviceMesh:
    """The dimensions ``ring`` (1) and ``ulysses`` of this process's group."""
    shape = (processes.data_size, 1, processes.context)
    mesh = make_mesh(processes, shape, ("data", "ring", "ulysses"))["ring", "ulysses"]
    limit_waits(mesh._flatten(), processes)  # the mesh that diffusers splits and gathers tokens over
    return mesh


def split_tokens(network: nn.Module, scaling: Scaling, mesh: DeviceMesh) -> None:
    """Split the network's tokens over the mesh, and add up the gradients of its inputs over it.

    Raises:
        UserError: if torch counts no accelerator: diffusers divides the rank by their number.
    """
    if not torch.accelerator.device_count():
        raise UserError("parallel.context: diffusers splits tokens over accelerators alone, and torch sees none")
    scaling.split_tokens(network, mesh)
    group = mesh["ulysses"].get_group()

    def whole_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(_summed(a, group) for a in args), {key: _summed(v, group) for key, v in kwargs.items()}

    network.register_forward_pre_hook(whole_gradients, with_kwargs=True)
    _SPLIT.add(network)


def has_split_tokens(network: nn.Module) -> bool:
    """True if a process's gradients of this network are those of its tokens alone."""
    return network in _SPLIT


_SPLIT: WeakSet[nn.Module] = WeakSet()


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group: each process has the part of its own tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _summed(value: Any, group: dist.ProcessGroup) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        return _SumGradient.apply(value, group)  # type: ignore[no-untyped-call]
    return value
