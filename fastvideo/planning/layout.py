"""Bytes that a process holds for each role and for moments of a step, from the shapes of a fake run's networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastvideo.data.prompts import read_prompts
from fastvideo.distillation.abilities import of_folder, of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.adapters.diffusers.packed import largest_matrix
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.ema import keep_averages
from fastvideo.distillation.engine.optional.footprint import FLOAT32, RoleBytes, holders, own_parameters, role_bytes
from fastvideo.distillation.engine.parallel.distributed import BUCKET
from fastvideo.distillation.engine.parallel.sharding import includes, is_trained
from fastvideo.distillation.experts import idle_expert_of, networks_of
from fastvideo.distillation.quantised_roles import sizes_of
from fastvideo.distillation.registry import load_method
from fastvideo.planning.fake import FakeRun

ENCODER = "text encoder"
"""Name of a family's frozen part."""
BUCKETS_UNDER_WAY = 2
"""Buckets of gradients that are averaged at a time."""
CUDA_CONTEXT = int(0.75 * 2**30)
"""Memory of a process on an H200 beside what torch reserved (docs/log.md, 2026-11-27)."""
NCCL = 2**30
"""Buffers of NCCL's communicators, an allowance: it depends on the machine, and was not measured."""
GATHERED_BLOCKS = 2
"""Blocks of a split network that are whole at a time: the one that computes, and the next on its way."""


@dataclass(frozen=True)
class RolePlan(RoleBytes):
    """One role on one process, with what its network takes where it is whole.

    Attributes:
        holds: the network is counted for this role.
        network_trained: something of the network is trained, by this role or by one that shares it.
        block: bytes of one repeated block, whole, in the compute dtype; 0 for a network that is never split.
        whole: bytes of the whole network in the compute dtype.
        called: bytes of what a call of the network runs: all of it, or one of two experts.
        unpacked: bytes of the matrix of a quantised network that is whole for a moment.
    """

    holds: bool
    network_trained: bool
    block: int
    whole: int
    called: int
    unpacked: int

    def stays_gathered(self, config: Config) -> bool:
        """True if the network is split, and whole from its first use to its last (in a step, if it is trained)."""
        return self.block > 0 and includes(config.parallel.keep_gathered, self.network_trained)


def role_plans(run: FakeRun) -> list[RolePlan]:
    """Every role's bytes on one process."""
    keep_averages(run.method.bundle, run.config.ema)
    counted_for = holders(run.method.bundle)
    return [_role(run, handle, counted_for[handle.network] == handle.name) for handle in run.method.bundle]


def _role(run: FakeRun, handle: RoleHandle, holds: bool) -> RolePlan:
    made_by, network, family = run.placement(handle), handle.network, run.families.by_role[handle.name]
    shard, packed = run.processes.shard if made_by else 1, sizes_of(run.config, handle, family)
    idle = idle_expert_of(load_method(run.config.distill_method), run.config.method)
    kept = role_bytes(handle, shard, run.config.trainer.optimizer_states, holds=holds, packed=packed, idle=idle)
    scaling, item = family.scaling, family.folder.compute_dtype
    blocks = scaling.blocks(network) if made_by and scaling is not None and not packed else []
    sizes = [_numel(own_parameters(handle, block)) * item.itemsize for block in blocks]
    return RolePlan(
        **vars(kept),
        holds=holds,
        network_trained=is_trained(network),
        block=max(sizes, default=0),
        whole=kept.parameters * item.itemsize,
        called=kept.parameters * item.itemsize // len(networks_of(network)),
        unpacked=largest_matrix(scaling.matrices(network)) if packed and scaling is not None else 0,
    )


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def gathered_bytes(config: Config, roles: Sequence[RolePlan]) -> int:
    """Memory of sharding beside the parts: blocks that are whole while they compute, and their gradients."""
    if config.parallel.shard == 1:
        return 0
    whole = sum(role.whole for role in roles if role.holds and role.stays_gathered(config))
    trained = [role for role in roles if role.trainable]
    # In float32 while they are reduced; before that, in the compute dtype, they take the place of their activations.
    unreduced = 2 * max(role.block for role in trained)
    if config.trainer.grad_accumulation > 1 and not config.parallel.sync_every_micro_batch:
        unreduced = sum(role.whole for role in trained)
    return whole + GATHERED_BLOCKS * max(role.block for role in roles) + unreduced


def reduction_bytes(config: Config, roles: Sequence[RolePlan], world: int) -> int:
    """Memory of averaging whole gradients over processes: the buckets under way."""
    if config.parallel.shard > 1 or world == 1:
        return 0
    return min(BUCKETS_UNDER_WAY * BUCKET, max(role.gradients for role in roles))


def device_bytes(config: Config, world: int) -> Mapping[str, int]:
    """Memory of a CUDA device that torch's allocator does not hand out."""
    if config.device != "cuda":
        return {}
    return {"CUDA context": CUDA_CONTEXT, **({"NCCL": NCCL} if world > 1 else {})}


def encoder_stays(config: Config, conditioner: Conditioner) -> bool:
    """True if a text encoder is needed while training: prompts that do not fit into the cache, at their longest."""
    if config.data.prompts is None or not Path(config.data.prompts).is_file():
        return config.data.prompts is not None
    count, length = len(read_prompts(config.data.prompts)), conditioner.text_length or 0
    width = of_texts(conditioner).stored_shapes["text_embedding"][-1] or 0
    return count * length * width * _encoder_item(config) > config.model.prompt_cache_mib * 2**20


def _encoder_item(config: Config) -> int:
    """Bytes of a text encoder's number: bfloat16 on CUDA, float32 elsewhere."""
    return 2 if config.device == "cuda" else FLOAT32


def encoders(run: FakeRun) -> Mapping[str, int]:
    """Bytes of the text encoders, which are freed before training once all texts are encoded."""
    return {name: size for name, size in _parts(run).items() if name.startswith(ENCODER)}


def frozen_parts(run: FakeRun) -> Mapping[str, int]:
    """Text encoders that stay while training, and VAEs where something is decoded or bridged."""
    stay = {
        _named(run, family, ENCODER)
        for family in dict.fromkeys((run.families.main, *run.families.placements))
        if encoder_stays(run.config, family.conditioner)
    }
    return {name: size for name, size in _parts(run).items() if name in stay or not name.startswith(ENCODER)}


def _named(run: FakeRun, family: Adapter, part: str) -> str:
    return part if family is run.families.main else f"{part} of {run.families.roles_of(family)[0]}"


def _parts(run: FakeRun) -> Mapping[str, int]:
    """Every text encoder, and the VAEs that a run loads."""
    found, main = dict[str, int](), run.families.main
    bridged = {run.families.by_role[role] for role in run.method.bundle.roles if run.bridged(role)}
    for family in dict.fromkeys((main, *run.families.placements)):
        decodes = family in bridged or (family is main and (bridged or run.config.validation.every > 0))
        for name, part in of_folder(family.folder).frozen_parts().items():
            if decodes or name != "VAE":
                item = _encoder_item(run.config) if name == ENCODER else FLOAT32
                found[_named(run, family, name)] = _numel(part.parameters()) * item
    return found
