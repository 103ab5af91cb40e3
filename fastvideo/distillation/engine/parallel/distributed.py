"""Processes: one on a laptop, many under torchrun; their layout, and collectives on the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.engine.optional.memory import total_memory
from fastvideo.errors import UserError
from fastvideo.stopping import received

BUCKET = 64 * 2**20
"""Most bytes of gradients that are reduced at once; a larger gradient travels alone."""


@dataclass(frozen=True)
class Processes:
    """This process among all, and their layout.

    Neighbouring ranks form the groups: ``context`` of them share one sample (each has a part of its tokens), ``shard``
    of them hold one copy of every network. Each of the two divides ``world_size``.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard: int = 1
    context: int = 1
    memory: int | None = None
    """Bytes of this process's device, in all; ``None`` if unknown: then nothing is refused."""
    timeout: float = 600.0
    """Seconds that a collective may wait: ranks that ran different forwards give an error instead of a hang."""

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of this process's batches and local random stream, shared by the ranks of a context group."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """Number of different batches at a time."""
        return self.world_size // self.context

    @property
    def forward_together(self) -> bool:
        """True if a forward of a network needs all processes."""
        return self.shard > 1 or self.context > 1

    def main_says(self, answer: bool) -> bool:
        """Share the main process's answer with all processes."""
        return bool(from_main(int(answer), self))

    def stop_signal(self) -> int:
        """Largest number of a signal that asked any process to stop; 0 if none was asked. All take part."""
        return largest_signal()

    def gather_to_main(self, values: Tensor) -> Tensor | None:
        """Gather parts ``[n, ...]`` of all data ranks to the host of the main process, as ``[data_size, n, ...]``.

        ``None`` on all others; every process takes part.
        """
        own = values.cpu().contiguous()
        if not dist.is_initialized():
            return own[None]
        parts = [torch.empty_like(own) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(own, parts)
        return torch.stack(parts[:: self.context]) if parts is not None else None

    def spread_from_main(self, values: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Copy the main process's float32 values to all processes' devices; the others pass ``None``."""
        own = torch.empty(tuple(shape)) if values is None else values.float().cpu().contiguous()
        if dist.is_initialized():
            dist.broadcast(own, src=0)
        return own.to(self.device)


def start_processes(device: str = "auto", layout: ParallelConfig | None = None) -> Processes:
    """Join the process group that torchrun describes in the environment, or stand alone without one.

    Args:
        device: ``auto`` (CUDA if available), ``cpu`` or ``cuda``.

    Raises:
        UserError: if CUDA is requested and absent, or the number of processes does not fit the layout.
    """
    layout = layout or ParallelConfig()
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    local = _device(device, local_rank)
    check_layout(world_size, layout)
    memory = total_memory(local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "WORLD_SIZE" not in os.environ:
        return Processes(device=local, memory=memory)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    # gloo beside NCCL: gradients of offloaded networks are reduced on the host.
    backend = "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=layout.timeout))
    return Processes(
        dist.get_rank(), dist.get_world_size(), local, layout.shard, layout.context, memory, layout.timeout
    )


def _device(kind: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise UserError("device: cuda is asked for, and torch sees no CUDA device; use --device cpu, or auto")
    if local_rank >= count:
        raise UserError(f"device: {local_rank + 1} or more processes on this machine, which has {count} CUDA devices")
    return torch.device("cuda", local_rank)


def check_layout(world_size: int, layout: ParallelConfig) -> None:
    """Check that the layout fits the number of processes.

    Raises:
        UserError: with the possible values.
    """
    for name, size in (("shard", layout.shard), ("context", layout.context)):
        if world_size % size:
            legal = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise UserError(
                f"parallel.{name}: {size} does not divide the number of processes, {world_size}; possible: {legal}"
            )
    shard, replicate = layout.shard, layout.replicate
    if replicate is not None and shard * replicate != world_size:
        raise UserError(
            f"parallel: shard {shard} x replicate {replicate} needs {shard * replicate} processes, there are "
            f"{world_size}; start that many (torchrun --nproc-per-node, --nnodes), or leave replicate to be derived"
        )


def stop_processes() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(processes: Processes, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all processes whose groups have the process group's timeout, instead of torch's default."""
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=names)
    for name in names:
        limit_waits(mesh[name], processes)
    return mesh


def limit_waits(mesh: DeviceMesh, processes: Processes) -> None:
    """Give the group of a mesh of one dimension the process group's timeout."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=processes.timeout), mesh.get_group())


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: int, processes: Processes) -> int:
    """Share the main process's value with all processes."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=processes.device)
    dist.broadcast(shared, src=0)
    return int(shared)


def largest_signal(group: dist.ProcessGroup | None = None) -> int:
    """Largest number of a signal that asked any process of a group (default: all) to stop; 0 if none was asked."""
    if not dist.is_initialized():
        return received()
    shared = torch.tensor(received())
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
    return int(shared)


def average(values: Tensor) -> Tensor:
    """Mean over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flags: Tensor) -> Tensor:
    """The largest of each float flag over processes; in place, without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def average_gradients(parameters: Sequence[nn.Parameter], times: int = 1) -> None:
    """Replace every gradient by ``times`` its mean over processes, in place.

    Gradients travel in buckets of at most :data:`BUCKET` bytes, two at a time, so that at most two buckets are copied;
    a larger gradient travels by itself, without a copy.
    """
    if not dist.is_initialized():
        return
    under_way: deque[_Bucket] = deque()
    for gradients in _buckets([p.grad for p in parameters if p.grad is not None]):
        under_way.append(_Bucket(gradients))
        if len(under_way) > 1:
            under_way.popleft().finish(times)
    while under_way:
        under_way.popleft().finish(times)


class _Bucket:
    """Gradients under way in one collective."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self.gradients, (first, *others) = gradients, gradients
        self.copied = bool(others) or not first.is_contiguous()
        self.flat = torch.cat([g.flatten() for g in gradients]) if self.copied else first
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self, times: int) -> None:
        """Wait, divide, and write the means into the gradients."""
        if self.work is not None:
            self.work.wait()
        self.flat /= dist.get_world_size()
        if times != 1:  # parts of one gradient add up
            self.flat *= times
        if self.copied:
            means = torch.split(self.flat, [g.numel() for g in self.gradients])
            torch._foreach_copy_(
                list(self.gradients), [m.view_as(g) for m, g in zip(means, self.gradients, strict=True)]
            )


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring gradients of one type."""
    bucket, size = list[Tensor](), 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
