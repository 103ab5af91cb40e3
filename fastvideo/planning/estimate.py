"""The estimate of a run: what each process holds, computes and sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastvideo.distillation.builder import Adapter, Config, build_adapter
from fastvideo.distillation.types import UserError
from fastvideo.planning.layout import (
    RoleBytes,
    frozen_parts,
    gathered_bytes,
    has_trained,
    reduction_bytes,
    role_bytes,
    stays_gathered,
)
from fastvideo.planning.simulate import StepCost, simulate
from fastvideo.wording import counted

ALL_TO_ALL = 4
"""Tensors that context parallelism exchanges per attention: queries, keys, values and the answer."""


@dataclass(frozen=True)
class Plan:
    """A run on ``world`` processes.

    Attributes:
        roles: bytes of each role on one process.
        parts: text encoder and VAE, by name.
        buffers: what sharding or averaging gradients holds for a moment.
        activations: what forward keeps for backward, at its most.
        step: arithmetic of one micro-batch on one process.
        sent: bytes that one process sends per step.
    """

    config: Config
    world: int
    roles: list[RoleBytes]
    parts: Mapping[str, int]
    buffers: int
    activations: int
    step: StepCost
    sent: int

    @property
    def total(self) -> int:
        """Bytes that one process holds at its most."""
        return sum(r.total for r in self.roles) + sum(self.parts.values()) + self.buffers + self.activations

    @property
    def flops(self) -> float:
        """Operations of one process per step."""
        return self.step.flops * self.config.trainer.grad_accumulation / self.config.parallel.context


@dataclass
class Planner:
    """Makes plans of variants of one run; what a step holds is simulated once per kind of step."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    _steps: dict[str, StepCost] = field(default_factory=dict)

    def plan(self, config: Config, world: int) -> Plan:
        """The estimate of ``config`` on ``world`` processes.

        Raises:
            UserError: if the layout does not divide the processes, or the family has nothing to plan.
        """
        check_layout(config, world)
        adapter = build_adapter(config)
        if adapter.scaling is None:
            raise UserError(f"plan: {config.distill_model} has no networks whose size is worth a plan")
        roles, split = role_bytes(config, adapter), config.parallel.shard > 1
        # Over a shared network the bytes of a step are taken as those of training it whole, which is a little more.
        shared = any(role.lora is not None for role in config.roles.values())
        leave = split or shared or config.trainer.grad_accumulation > 1
        step = self._step(config, adapter, split or shared, leave)
        gradients = sum(role.gradients for role in roles)
        # Gradients that stay are among what a step holds; they grow while activations go.
        activations = step.peak if leave else max(step.peak - gradients, 0)
        gathered = gathered_bytes(config, roles)
        reduction = reduction_bytes(config, roles, world)
        activations //= config.parallel.context
        return Plan(
            config=config,
            world=world,
            roles=roles,
            parts=frozen_parts(config, adapter.folder),
            buffers=gathered + max(reduction - activations, 0),
            activations=activations,
            step=step,
            sent=int(_sent(config, adapter, roles, step, world)),
        )

    def _step(self, config: Config, adapter: Adapter, split: bool, leave: bool) -> StepCost:
        what = config.model_dump(include={"model", "method", "roles", "ladder", "distill_method"})
        key = repr((what, config.data.batch_size, config.parallel.activation_checkpointing, split, leave))
        if key not in self._steps:
            self._steps[key] = simulate(config, adapter, split=split, leave=leave)
        return self._steps[key]


def check_layout(config: Config, world: int) -> None:
    """Check that the layout divides the processes.

    Raises:
        UserError: with the values that do.
    """
    allowed = [n for n in range(1, world + 1) if world % n == 0]
    for name, value in (("shard", config.parallel.shard), ("context", config.parallel.context)):
        if value not in allowed:
            raise UserError(
                f"parallel.{name} is {value}, which does not divide {counted(world, 'process')}: one of {allowed}"
            )


def _sent(config: Config, adapter: Adapter, roles: list[RoleBytes], step: StepCost, world: int) -> float:
    """Bytes per step and process, by ring algorithms."""
    shard, context, micro = config.parallel.shard, config.parallel.context, config.trainer.grad_accumulation
    copies, sent = world // shard, 0.0
    for role in roles:
        forwards, backwards = step.calls[role.name] * micro, step.backwards[role.name] * micro
        updates = step.backwards[role.name] and min(1.0, step.backwards[role.name])
        if shard > 1 and role.block:
            reductions = backwards if config.parallel.sync_every_micro_batch else updates
            sent += (shard - 1) / shard * role.whole * _gathers(config, role, forwards, backwards)
            sent += (shard - 1) * role.gradients * reductions
        sent += 2 * (copies - 1) / copies * role.gradients * updates
        if context > 1 and role.block:
            sent += _exchanged(config, adapter) * (forwards + backwards)
    return sent


def _gathers(config: Config, role: RoleBytes, forwards: float, backwards: float) -> float:
    """How often a split network is put together in a step."""
    if not stays_gathered(config, role):
        return forwards + backwards
    micro = config.trainer.grad_accumulation
    return min(forwards, micro) if has_trained(config, role) else 0.0


def _exchanged(config: Config, adapter: Adapter) -> float:
    """Bytes that one forward sends to share attention among the processes of a sample."""
    assert adapter.scaling is not None
    counts = adapter.scaling.context_counts(None, adapter.codec.latent_shape)
    context, item = config.parallel.context, adapter.folder.compute_dtype.itemsize
    tokens = max(counts.values()) * config.data.batch_size / context
    return ALL_TO_ALL * tokens * sum(adapter.feature_widths) * item * (context - 1) / context


def calibrate(plan: Plan) -> float:
    """Operations per second of this machine on matrix products as wide as the network's, a short measurement."""
    import time

    adapter = build_adapter(plan.config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = adapter.feature_widths[0]
    left = torch.ones(1024, width, device=device, dtype=adapter.folder.compute_dtype)
    right = torch.ones(width, 4 * width, device=device, dtype=adapter.folder.compute_dtype)
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 2.0:
        (left @ right)[0, 0].item()
        rounds += 1
    return 2 * 1024 * width * 4 * width * rounds / (time.perf_counter() - start)
