"""Placement of a role's network on this process: loaded whole, or as a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.engine.lora import (
    adapter_files,
    add_adapter,
    gather_adapter,
    merge,
    merge_file,
    switch_of,
)
from fastvideo.distillation.engine.parallel.context import check_context, context_mesh, split_tokens
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.recompute import checkpointed
from fastvideo.distillation.engine.parallel.sharding import (
    gather_state,
    home_of,
    load_shards,
    shard_mesh,
    shard_network,
)
from fastvideo.distillation.rng import stream_seed
from fastvideo.distillation.scaling import Quantise, Scaling, Storage
from fastvideo.errors import UserError


class NetworkFolder(Protocol):
    """The part of a family's ``ModelFolder`` that loads networks."""

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module: ...


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
        self._choose_precision(network, alike=not trained)
        return network

    def check_packing(self, kind: Quantise, where: str) -> None:
        """Check that :meth:`load_packed` can store matrices in this way.

        Raises:
            UserError: naming the package that is missing.
        """
        assert self.source.scaling is not None
        self.source.scaling.check_packing(kind, where)

    def load_packed(
        self, host: NetworkFolder, path: str | None, kind: Storage, where: str, change: Callable[[nn.Module], None]
    ) -> nn.Module:
        """Load a frozen network with its matrices in fewer bits; every process holds it whole.

        Args:
            host: the source's folder, for networks on the host.
            where: the config's key, for a call whose inputs need a gradient, which is refused.
            change: called with the network before it is packed.
        """
        dtype, scaling = self.source.folder.compute_dtype, self.source.scaling
        assert scaling is not None
        if kind == "gguf":
            network = of_folder(host).load_gguf(str(path), dtype, where)
        else:
            network = host.load_network(path, dtype)
        change(network)
        scaling.pack(network, kind, self.processes.device, where)
        if self.processes.context > 1:
            split_tokens(network, scaling, self._context_mesh)
        self._choose_precision(network, alike=True)
        return network

    def load_shared(
        self,
        path: str | None,
        adapters: Mapping[str, LoRAConfig],
        seed: int,
        change: Callable[[nn.Module], None] | None = None,
    ) -> nn.Module:
        """Load a frozen network with a trainable adapter per role, for those roles and for its teacher.

        Args:
            change: called with the network and its adapters before it is sharded.

        Raises:
            UserError: if an adapter does not fit the network.
        """
        network = self._new(path, self.source.folder.compute_dtype).requires_grad_(False)
        for number, (role, options) in enumerate(adapters.items()):
            add_adapter(network, role, options, self._adapter_seed(seed, number))
        if change is not None:
            change(network)
        self._spread(network, path)
        self._choose_precision(network, alike=False)
        return network

    def _adapter_seed(self, seed: int, number: int) -> int | None:
        return stream_seed(seed, "adapter", number)

    def _choose_precision(self, network: nn.Module, *, alike: bool) -> None:
        """Leave autocast to whole networks with float32 matrices or adapters: FSDP gathers all in the compute dtype.

        Args:
            alike: all matrices of the whole network have that dtype too.
        """
        if self.source.scaling is not None and (alike or self.processes.shard > 1):
            self.source.scaling.compute_directly(network)

    def _new(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        scaling = self.source.scaling
        if scaling is None or self.processes.shard == 1:
            return self.source.folder.load_network(path, dtype)
        return of_folder(self.source.folder).empty(path, dtype)

    def _spread(self, network: nn.Module, path: str | None) -> None:
        scaling = self.source.scaling
        if scaling is None:
            return
        self._recompute(network, scaling)
        if self.processes.context > 1:  # before sharding, which gives every module a new class
            split_tokens(network, scaling, self._context_mesh)
        if self.processes.shard > 1:
            self._shard(network, scaling, path)

    def _recompute(self, network: nn.Module, scaling: Scaling) -> None:
        if self.options.activation_checkpointing != "none":
            scaling.recompute(network, checkpointed(self.options.activation_checkpointing))

    def _shard(self, network: nn.Module, scaling: Scaling, path: str | None) -> None:
        units, dtype = scaling.blocks(network), self.source.folder.compute_dtype
        shard_network(network, units, self._mesh, self.processes, self.options, dtype)
        load_shards(
            network, of_folder(self.source.folder).files(path), home_of(network, self.options, self.processes.device)
        )


class EmptyPlacement(Placement):
    """Makes the same networks whole and without weights, on the meta device: a run is counted on them."""

    @classmethod
    def of(cls, real: Placement) -> EmptyPlacement:
        """The networks of a placement."""
        return cls(real.source, real.processes, real.options)

    def _new(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        return of_folder(self.source.folder).empty(path, dtype)

    def _spread(self, network: nn.Module, path: str | None) -> None:
        if self.source.scaling is not None:
            self._recompute(network, self.source.scaling)

    def _adapter_seed(self, seed: int, number: int) -> int | None:
        """No seed: adapters are empty too."""
        return None

    def check_packing(self, kind: Quantise, where: str) -> None:
        """Check nothing: bytes are counted without the packages that store them."""

    def load_packed(
        self, host: NetworkFolder, path: str | None, kind: Storage, where: str, change: Callable[[nn.Module], None]
    ) -> nn.Module:
        """Load the network unpacked: its bytes are counted from the shapes."""
        return self.load(path, trained=False, change=change)


def check_tokens(
    source: NetworkSource, processes: Processes, roles: Mapping[str, str | None], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Check that the processes of one sample can share the tokens and heads of networks evenly; nothing is loaded.

    Args:
        roles: path of each role's network.
        shapes: latents ``(C, F, H, W)`` of one sample, each of which is trained on.

    Raises:
        UserError: naming the first role with which they cannot.
    """
    if source.scaling is None or processes.context == 1:
        return
    for role, path in roles.items():
        counts = {shape: source.scaling.context_counts(path, shape) for shape in shapes}
        check_context(processes, joined_counts(counts), f"role {role!r}")


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
        for file, weight in switch.merged:
            merge_file(whole, file, weight)
        merge(whole, state, switch.scaling)
        return whole
    whole = of_folder(source.folder).empty(None, torch.float32)
    whole.load_state_dict(state, assign=True)
    return whole


@contextmanager
def result_of(
    handle: RoleHandle, source: NetworkSource, processes: Processes
) -> Iterator[tuple[nn.Module | None, dict[str, dict[str, Tensor]]]]:
    """A role's network for saving (averaged weights if it has some) and files of its adapter by name, if any.

    All processes take part, because each may hold a shard; only the main one gets the network.
    """
    switch, files = switch_of(handle), dict[str, dict[str, Tensor]]()
    with handle.averaged():
        whole = whole_network(handle, source, processes)
        if switch is not None:
            files = adapter_files(gather_adapter(handle), switch.scaling, source.folder.parts[0])
        yield whole, files


def read_whole(folder: NetworkFolder, path: str | None) -> nn.Module:
    """Read a network to the host, in float32."""
    if (whole := of_folder(folder).from_file(path)) is not None:
        return whole
    network, state = of_folder(folder).empty(path, torch.float32), dict[str, Tensor]()
    found = {name: stored for name, stored in of_folder(folder).files(path).items() if name in network.state_dict()}
    for file in sorted({stored.file for stored in found.values()}):
        tensors = load_file(file)
        state |= {name: tensors[stored.name].float() for name, stored in found.items() if stored.file == file}
    network.load_state_dict(state, strict=False, assign=True)
    return network
