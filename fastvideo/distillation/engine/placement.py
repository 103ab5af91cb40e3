"""A role's network on this process: loaded whole, or as this process's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.schema import LoRAConfig, ParallelConfig, RoleConfig
from fastvideo.distillation.engine.ema import averaged, has_average
from fastvideo.distillation.engine.lora import ADAPTER_FILE, RoleView, add_adapter, gather_adapter, merge, portable
from fastvideo.distillation.engine.optim import States
from fastvideo.distillation.engine.optional.footprint import Kept, check_memory
from fastvideo.distillation.engine.parallel.context import check_context, context_mesh, split_tokens
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.recompute import checkpointed
from fastvideo.distillation.engine.parallel.sharding import (
    ShardPolicy,
    gather_state,
    home_of,
    includes,
    load_shards,
    shard_mesh,
    shard_network,
)
from fastvideo.distillation.rng import stream_seed
from fastvideo.distillation.scaling import Scaling
from fastvideo.errors import UserError


class NetworkSource(Protocol):
    """The part of an adapter that gives networks."""

    @property
    def scaling(self) -> Scaling | None: ...
    @property
    def latent_shape(self) -> tuple[int, int, int, int]: ...
    @property
    def text_length(self) -> int | None: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module: ...


class Placement:
    """Makes the networks of a run.

    Raises:
        UserError: for a family that cannot do what the layout asks.
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

    def check(self, roles: Mapping[str, str | None], shapes: Sequence[tuple[int, ...]] = ()) -> None:
        """Check the networks behind ``roles`` (name to path) against the layout; nothing is loaded.

        Args:
            roles: the path of each.
            shapes: latents ``(C, F, H, W)`` of one sample, each of which is trained on; the model's own if none.

        Raises:
            UserError: if the processes of one sample cannot share its tokens and heads evenly.
        """
        scaling, text_length = self.source.scaling, self.source.text_length or 0
        if scaling is None or self.processes.context == 1:
            return
        for role, path in roles.items():
            sizes = shapes or [self.source.latent_shape]
            counts = {shape: scaling.context_counts(path, shape, text_length) for shape in sizes}
            check_context(self.processes, joined_counts(counts), f"role {role!r}")

    def check_memory(self, roles: Mapping[str, RoleConfig], states: States) -> None:
        """Check that this process's device holds what these roles keep on it from step to step; nothing is loaded.

        Adapters are not counted: beside the network that they share they are small.

        Raises:
            UserError: with each role's need, and the ``parallel.shard`` that would fit.
        """
        source, kept = self.source, dict[str, Kept]()
        if source.scaling is None or self.processes.memory is None:
            return
        adapted = {role.path for role in roles.values() if role.lora is not None}
        made: dict[tuple[str | None, torch.dtype], list[nn.Parameter]] = {}
        for name, role in roles.items():
            whole = role.trainable and role.lora is None
            key = role.path, torch.float32 if whole else source.compute_dtype
            on_host = includes(self.options.offload, role.trainable)
            if on_host or (not whole and role.path in adapted and key in made):  # one network under several roles
                continue
            if key not in made:
                made[key] = list(source.scaling.empty(*key).parameters())
            kept[name] = Kept(made[key], whole)
        check_memory(kept, self.processes, states)

    def load(self, path: str | None, *, trained: bool, change: Callable[[nn.Module], None] | None = None) -> nn.Module:
        """The network of one role; frozen weights are kept in the dtype that they are computed in.

        Args:
            path: as for the adapter's ``load_network``.
            trained: whether its parameters need gradients.
            change: what is added to the network before anything is done with it.
        """
        network = self._new(path, torch.float32 if trained else self.source.compute_dtype)
        if change is not None:
            change(network)
        network.requires_grad_(trained)
        self._spread(network, path)
        return network

    def load_shared(self, path: str | None, adapters: Mapping[str, LoRAConfig], seed: int) -> nn.Module:
        """A frozen network with a trainable adapter per role, for those roles and for its teacher.

        Raises:
            UserError: if an adapter does not fit the network.
        """
        network = self._new(path, self.source.compute_dtype).requires_grad_(False)
        for number, (role, options) in enumerate(adapters.items()):
            add_adapter(network, role, options, stream_seed(seed, "adapter", number))
        self._spread(network, path)
        return network

    def _new(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        scaling = self.source.scaling
        if scaling is None or self.processes.shard == 1:
            return self.source.load_network(path, dtype)
        return scaling.empty(path, dtype)

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
        policy = ShardPolicy(self.options.keep_gathered, self.options.offload, self.source.compute_dtype)
        shard_network(network, scaling.blocks(network), self._mesh, self.processes, policy)
        load_shards(network, scaling.files(path), home_of(network, policy, self.processes.device))


def joined_counts(counts: Mapping[tuple[int, ...], Mapping[str, int]]) -> dict[str, int]:
    """What must be divided for each of several shapes, once where it is the same for all."""
    found = dict[str, int]()
    for shape, of_shape in counts.items():
        for name, count in of_shape.items():
            same = all(other[name] == count for other in counts.values())
            found[name if same else f"{name} of {'x'.join(map(str, shape))}"] = count
    return found


def whole_network(network: nn.Module, source: NetworkSource, processes: Processes) -> nn.Module | None:
    """The network for saving, with a role's adapter merged into it; ``None`` on all but the main process.

    A network that is split, or has an adapter, is put together on the host; all processes take part.
    """
    scaling, split = source.scaling, isinstance(network, FSDPModule)
    if scaling is None or not (split or isinstance(network, RoleView)):
        return network if processes.is_main else None
    state = gather_adapter(network) if isinstance(network, RoleView) else gather_state(network)
    if not processes.is_main:
        return None
    if isinstance(network, RoleView):
        whole = read_whole(scaling, network.path)
        merge(whole, state, network.scaling)
        return whole
    whole = scaling.empty(None, torch.float32)
    whole.load_state_dict(state, assign=True)
    return whole


@contextmanager
def result_of(
    handle: RoleHandle, source: NetworkSource, processes: Processes
) -> Iterator[tuple[nn.Module | None, dict[str, dict[str, Tensor]]]]:
    """A role's network for saving (averaged weights if it has some) and files of its adapter by name, if any.

    All processes take part, because each may have a part of the weights; only the main one gets the network.
    """
    with averaged(handle) if has_average(handle) else nullcontext(handle.network) as network:
        whole = whole_network(network, source, processes)
        files = {}
        if isinstance(network, RoleView):
            files[ADAPTER_FILE] = portable(gather_adapter(network), network.scaling)
        yield whole, files


def read_whole(scaling: Scaling, path: str | None) -> nn.Module:
    """A network on the host, float32."""
    network, files = scaling.empty(path, torch.float32), scaling.files(path)
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    network.load_state_dict({n: t for n, t in state.items() if n in network.state_dict()}, strict=False, assign=True)
    return network
