"""Processes: one on a laptop, many under torchrun. Nothing outside this folder knows a process group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait: a rank that ran other forwards is then an error and not a hang."""


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def start_processes(device: str = "auto") -> Processes:
    """Join the process group that torchrun describes in the environment, or stand alone without one.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if "WORLD_SIZE" not in os.environ:
        return Processes(device=local)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: int, processes: Processes) -> int:
    """The main process's value, on all processes: for what one decides and all must follow."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=processes.device)
    dist.broadcast(shared, src=0)
    return int(shared)


def average(values: Tensor) -> Tensor:
    """Mean over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag: Tensor) -> Tensor:
    """A float scalar that is 1 on any process, as 1 on all; in place, without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, with one collective for all of them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not dist.is_initialized() or not gradients:
        return
    flat = average(torch.cat([g.flatten() for g in gradients]))
    means = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
