"""Sharded networks: FSDP2 (``fully_shard``), or HSDP with several copies of the sharded network.

Every parameter is a ``DTensor`` split along its first dimension. The repeated blocks of a network are gathered one at a
time while they compute; master weights, gradients and optimizer state stay split.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.engine.parallel.distributed import Processes, average_gradients, make_mesh
from fastvideo.distillation.scaling import StoredTensor

Which = Literal["none", "frozen", "all"]
"""Networks that an option applies to."""


def shard_mesh(processes: Processes) -> DeviceMesh:
    """Two dimensions, ``replicate`` and ``shard``; neighbouring ranks hold one copy."""
    shape = (processes.world_size // processes.shard, processes.shard)
    return make_mesh(processes, shape, ("replicate", "shard"))


def shard_network(
    network: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    processes: Processes,
    layout: ParallelConfig,
    compute_dtype: torch.dtype,
) -> None:
    """Shard ``network`` in place, to be gathered one of ``units`` at a time.

    Set ``requires_grad`` first: a network with no parameter that needs a gradient counts as frozen.

    Args:
        compute_dtype: dtype of gathered parameters; gradients are always reduced in float32.
    """
    trained = is_trained(network)
    precise, offloaded = compute_dtype == torch.float32, includes(layout.offload, trained)
    options: dict[str, Any] = {
        # One dimension is plain FSDP, two are HSDP.
        "mesh": mesh["shard"] if mesh["replicate"].size() == 1 else mesh,
        # The outermost module too: parameters are sharded between steps, for clipping and averages.
        "reshard_after_forward": not includes(layout.keep_gathered, trained),
        # Inputs are not cast: times are never bfloat16, and the family casts the others.
        "mp_policy": MixedPrecisionPolicy(
            None if precise else compute_dtype, None if precise else torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(processes.device.type == "cuda") if offloaded else OffloadPolicy(),
    }
    # diffusers reshapes a network's prediction last, and no adapter changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(network, **options)
    if processes.context > 1:
        _sum_over_context(network, processes.data_size)


def includes(which: Which, trained: bool) -> bool:
    """True if an option for ``which`` networks applies to a trained (or frozen) one."""
    return which == "all" or (which == "frozen" and not trained)


def free_gathered(network: nn.Module) -> None:
    """Free the blocks of a sharded network that its last forward left gathered.

    Needed before weights are changed or read by name: gathered blocks are copies that would keep their old values.
    """
    if isinstance(network, FSDPModule):
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_trained(network: nn.Module) -> bool:
    """True if any parameter needs a gradient."""
    return any(parameter.requires_grad for parameter in network.parameters())


def home_of(network: nn.Module, layout: ParallelConfig, device: torch.device) -> torch.device:
    """Device that a network's shards stay on between its calls."""
    return torch.device("cpu") if includes(layout.offload, is_trained(network)) else device


def _sum_over_context(network: nn.Module, data_size: int) -> None:
    """Divide summed gradients by the number of data ranks: those of one sample's tokens add up."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(data_size))
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction with another factor


def load_shards(network: nn.Module, files: Mapping[str, StoredTensor], device: torch.device) -> None:
    """Fill a sharded network on the meta device; every process reads only its own slices.

    Args:
        network: as :func:`shard_network` left it.
        files: where each parameter is stored, by name; other parameters are left alone.
        device: see :func:`home_of`.
    """
    state = {}
    for name, parameter in network.named_parameters():
        stored = name.replace(".base_layer.", ".")  # where an adapter was put around a layer
        if stored in files and isinstance(parameter, DTensor):
            local = _read_slice(files[stored], parameter).to(device, parameter.dtype)
            state[name] = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).to(device)  # not the mesh's device if offloaded
    network.load_state_dict(state, strict=False, assign=True)


def _read_slice(where: StoredTensor, parameter: DTensor) -> Tensor:
    """Read this process's rows; as in ``torch.chunk``, the last processes may have fewer, or none."""
    placement = parameter.placements[-1]
    if not isinstance(placement, Shard) or placement.dim:
        raise RuntimeError(f"{where.name} is not split along its first dimension")
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    per_process = -(-rows // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * per_process, rows)
    with safe_open(where.file, "pt") as stored:
        return stored.get_slice(where.name)[start : min(start + per_process, rows)]  # type: ignore[no-any-return]


def gather_state(network: nn.Module) -> dict[str, Tensor]:
    """Gather the whole state of a sharded network to the main process's host; the others get nothing."""
    state: Any = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(state)


def synchronise(network: nn.Module, now: bool) -> None:
    """Let the next backward passes of a sharded network reduce gradients, or add them up unreduced.

    Unreduced gradients cost the memory of one whole gradient and save the traffic.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)


def reduce_gradients(parameters: Sequence[nn.Parameter], context: int = 1) -> None:
    """Average gradients over processes; those of sharded parameters were reduced in backward already.

    Args:
        context: number of processes that hold parts of one gradient, which add up instead.
    """
    average_gradients([p for p in parameters if not isinstance(p, DTensor)], context)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; a whole tensor itself, detached."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    """Gather a tensor on every process; all of them take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Float32 norm of each tensor, whole or sharded, ``[N]``; one collective for all of them."""
    norms = torch.stack(torch._foreach_norm([local(tensor).float() for tensor in tensors]))
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    if not meshes:
        return norms
    split = torch.tensor([isinstance(tensor, DTensor) for tensor in tensors], device=norms.device)
    squares = norms.square() * split
    dist.all_reduce(squares, group=meshes[0].get_group(meshes[0].ndim - 1))
    return torch.where(split, squares.sqrt(), norms)
