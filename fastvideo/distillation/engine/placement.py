"""Placement of a role's network on this process: loaded whole, or as a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.schema import LoRAConfig, RoleConfig
from fastvideo.distillation.config.sections import ParallelConfig
from fastvideo.distillation.engine.ema import averaged, has_average
from fastvideo.distillation.engine.lora import ADAPTER_FILE, add_adapter, gather_adapter, merge, portable, switch_of
from fastvideo.distillation.engine.optional.footprint import ResidentBytes, check_memory
from fastvideo.distillation.engine.parallel.context import check_context, context_mesh, split_tokens
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.recompute import checkpointed
from fastvideo.distillation.engine.parallel.sharding import (
    gather_state,
    home_of,
    includes,
    load_shards,
    shard_mesh,
    shard_network,
)
from fastvideo.distillation.engine.training import States
from fastvideo.distillation.scaling import Scaling
from fastvideo.errors import UserError


class NetworkFolder(Protocol):
    """The part of a family's ``ModelFolder`` that loads networks."""

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module: ...
    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module: ...
    def files(self, path: str | None) -> Mapping[str, Path]: ...


class NetworkSource(Protocol):
    """The part of an adapter that loads and splits networks."""

    @property
    def scaling(self) -> Scaling | None: ...
    @property
    def folder(self) -> NetworkFolder: ...


class Placement:
    """Makes the networks of a run.

    Raises:
        UserError: for a family that does not support the layout.
    """

    def __init__(self, source: NetworkSource, processes: Processes, options: ParallelConfig) -> None:
        self.source, self.processes, self.options = source, processes, options
        if self._special and source.scaling is None:
            raise UserError(
                f"parallel: {type(source).__name__} has no repeated blocks to shard, split or recompute; only "
                f"data-parallel runs of it are possible (shard 1, context 1, activation_checkpointing none)"
            )

    @property
    def _special(self) -> bool:
        return self.processes.forward_together or self.options.activation_checkpointing != "none"

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return shard_mesh(self.processes)

    @cached_property
    def _context_mesh(self) -> DeviceMesh:
        return context_mesh(self.processes)

    def check(self, roles: Mapping[str, str | None], shapes: Sequence[tuple[int, ...]]) -> None:
        """Check the networks behind ``roles`` (name to path) against the layout, before any is loaded.

        Args:
            shapes: latents ``(C, F, H, W)`` of one sample, for each size in the data.

        Raises:
            UserError: if the processes of one sample cannot share its tokens and heads evenly.
        """
        scaling = self.source.scaling
        if scaling is None or self.processes.context == 1:
            return
        for role, path in roles.items():
            counts = {shape: scaling.context_counts(path, shape) for shape in shapes}
            check_context(self.processes, joined_counts(counts), f"role {role!r}")

    def check_memory(self, roles: Mapping[str, RoleConfig], states: States) -> None:
        """Check that this process's device holds the resident bytes of these roles, before any network is loaded.

        Adapters are not counted: they are small beside the network that they share.

        Raises:
            UserError: with each role's need, and the ``parallel.shard`` that would fit.
        """
        source, resident = self.source, dict[str, ResidentBytes]()
        if source.scaling is None or self.processes.memory is None:
            return
        adapted = {role.path for role in roles.values() if role.lora is not None}
        made: dict[tuple[str | None, torch.dtype], list[nn.Parameter]] = {}
        for name, role in roles.items():
            whole = role.trainable and role.lora is None
            key = role.path, torch.float32 if whole else source.folder.compute_dtype
            on_host = includes(self.options.offload, role.trainable)
            if on_host or (not whole and role.path in adapted and key in made):  # one network under several roles
                continue
            if key not in made:
                made[key] = list(source.folder.empty(*key).parameters())
            resident[name] = ResidentBytes(made[key], whole)
        check_memory(resident, self.processes, states)

    def load(self, path: str | None, *, trained: bool, change: Callable[[nn.Module], None] | None = None) -> nn.Module:
        """Load the network of one role; frozen weights are stored in the dtype that they are computed in.

        Args:
            path: as for the folder's ``load_network``.
            change: called with the network before it is sharded.
        """
        network = self._new(path, torch.float32 if trained else self.source.folder.compute_dtype)
        if change is not None:
            change(network)
        network.requires_grad_(trained)
        self._spread(network, path)
        return network

    def load_shared(self, path: str | None, adapters: Mapping[str, LoRAConfig], seed: int) -> nn.Module:
        """Load a frozen network with a trainable adapter per role, for those roles and for its teacher.

        Raises:
            UserError: if an adapter does not fit the network.
        """
        network = self._new(path, self.source.folder.compute_dtype).requires_grad_(False)
        for number, (role, options) in enumerate(adapters.items()):
            add_adapter(network, role, options, seed + number)
        self._spread(network, path)
        return network

    def _new(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        scaling = self.source.scaling
        if scaling is None or self.processes.shard == 1:
            return self.source.folder.load_network(path, dtype)
        return self.source.folder.empty(path, dtype)

    def _spread(self, network: nn.Module, path: str | None) -> None:
        scaling = self.source.scaling
        if scaling is None:
            return
        if self.options.activation_checkpointing != "none":
            scaling.recompute(network, checkpointed(self.options.activation_checkpointing))
        if self.processes.context > 1:  # before sharding, which gives every module a new class
            split_tokens(network, scaling, self._context_mesh)
        if self.processes.shard > 1:
            self._shard(network, scaling, path)

    def _shard(self, network: nn.Module, scaling: Scaling, path: str | None) -> None:
        units, dtype = scaling.blocks(network), self.source.folder.compute_dtype
        shard_network(network, units, self._mesh, self.processes, self.options, dtype)
        load_shards(network, self.source.folder.files(path), home_of(network, self.options, self.processes.device))


def joined_counts(counts: Mapping[tuple[int, ...], Mapping[str, int]]) -> dict[str, int]:
    """Join the counts that must be divided for several shapes; equal ones appear once."""
    found = dict[str, int]()
    for shape, of_shape in counts.items():
        for name, count in of_shape.items():
            same = all(other[name] == count for other in counts.values())
            found[name if same else f"{name} of {'x'.join(map(str, shape))}"] = count
    return found


def whole_network(handle: RoleHandle, source: NetworkSource, processes: Processes) -> nn.Module | None:
    """Gather a role's network for saving, its adapter merged; ``None`` on all but the main process.

    A sharded network, or one with an adapter, is put together on the host; all processes take part.
    """
    switch, split = switch_of(handle), isinstance(handle.network, FSDPModule)
    if source.scaling is None or not (split or switch):
        return handle.network if processes.is_main else None
    state = gather_adapter(handle) if switch else gather_state(handle.network)
    if not processes.is_main:
        return None
    if switch:
        whole = read_whole(source.folder, switch.path)
        merge(whole, state, switch.scaling)
        return whole
    whole = source.folder.empty(None, torch.float32)
    whole.load_state_dict(state, assign=True)
    return whole


@contextmanager
def result_of(
    handle: RoleHandle, source: NetworkSource, processes: Processes
) -> Iterator[tuple[nn.Module | None, dict[str, dict[str, Tensor]]]]:
    """A role's network for saving (averaged weights if it has some) and files of its adapter by name, if any.

    All processes take part, because each may hold a shard; only the main one gets the network.
    """
    switch, files = switch_of(handle), {}
    with averaged(handle) if has_average(handle) else nullcontext():
        whole = whole_network(handle, source, processes)
        if switch is not None:
            files[ADAPTER_FILE] = portable(gather_adapter(handle), switch.scaling)
        yield whole, files


def read_whole(folder: NetworkFolder, path: str | None) -> nn.Module:
    """Read a network to the host, in float32."""
    network, files = folder.empty(path, torch.float32), folder.files(path)
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    network.load_state_dict({n: t for n, t in state.items() if n in network.state_dict()}, strict=False, assign=True)
    return network
