"""The estimate of a run: what each process holds, computes and sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvideo.distillation.builder import Config
from fastvideo.distillation.engine.optional.snapshots import disk_bytes
from fastvideo.distillation.engine.parallel.distributed import Processes, check_layout
from fastvideo.distillation.features import widths_of
from fastvideo.planning.fake import FakeRun, fake_run
from fastvideo.planning.layout import (
    RolePlan,
    device_bytes,
    encoders,
    frozen_parts,
    gathered_bytes,
    reduction_bytes,
    role_plans,
)
from fastvideo.planning.simulate import StepCost, simulate
from fastvideo.planning.validating import validation_bytes
from fastvideo.tiny.world import WORLDS

ALL_TO_ALL = 4
"""Tensors that context parallelism exchanges per attention: queries, keys, values and the answer."""


@dataclass(frozen=True)
class Plan:
    """A run on ``world`` processes.

    Attributes:
        roles: bytes of each role on one process.
        parts: text encoder, VAE and what the device itself takes, by name.
        buffers: what sharding, averaging gradients or a quantised matrix holds for a moment.
        activations: what forward keeps for backward at its most, by the role whose loss it is.
        validation: what a validation holds beside weights, optimizers, averages and parts; gradients are freed then.
        encoding: text encoders that are there until all texts are encoded, before the first step.
        step: arithmetic of one micro-batch on one process.
        sent: bytes that one process sends per step.
        snapshots: most bytes on the disk of what averages are made of after the run.
    """

    config: Config
    world: int
    roles: Sequence[RolePlan]
    parts: Mapping[str, int]
    buffers: int
    activations: Mapping[str, int]
    validation: int
    encoding: int
    step: StepCost
    sent: int
    snapshots: int

    @property
    def stays(self) -> int:
        """Bytes that one process holds between steps."""
        return sum(role.total - role.gradients for role in self.roles) + sum(self.parts.values())

    @property
    def training(self) -> int:
        """Bytes beside those that stay at the most of a step."""
        return sum(role.gradients for role in self.roles) + self.buffers + max(self.activations.values())

    @property
    def total(self) -> int:
        """Bytes that one process holds at its most: in a step, in a validation, or before the first step."""
        return self.stays + max(self.training, self.validation, self.encoding)

    @property
    def flops(self) -> float:
        """Operations of one process per step."""
        return self.step.flops * self.config.trainer.grad_accumulation / self.config.parallel.context


class Planner:
    """Makes plans of variants of one run; what a step holds is simulated once per kind of step."""

    def __init__(self) -> None:
        self._steps: dict[str, StepCost] = {}
        self._validations: dict[str, int] = {}

    def plan(self, config: Config, world: int) -> Plan:
        """The estimate of ``config`` on ``world`` processes.

        Raises:
            UserError: if the layout does not divide the processes or what they share, or as the builder does.
        """
        layout = config.parallel
        check_layout(world, layout)
        run = fake_run(config, Processes(world_size=world, shard=layout.shard, context=layout.context))
        roles, split = role_plans(run), layout.shard > 1
        leave = split or config.trainer.grad_accumulation > 1
        step = self._step(run, split, leave)
        # Gradients that stay are among what a step holds; they grow while activations go.
        gradients = 0 if leave else sum(role.gradients for role in roles)
        activations = {role: max(peak - gradients, 0) // layout.context for role, peak in step.peaks.items()}
        gathered, reduction = gathered_bytes(config, roles), reduction_bytes(config, roles, world)
        return Plan(
            config=config,
            world=world,
            roles=roles,
            parts={**(parts := frozen_parts(run)), **device_bytes(config, world)},
            buffers=gathered + max(reduction - max(activations.values()), 0) + max(role.unpacked for role in roles),
            activations=activations,
            validation=self._validation(run, gathered),
            encoding=sum(size for name, size in encoders(run).items() if name not in parts) if encodes(config) else 0,
            step=step,
            sent=int(_sent(run, roles, step)),
            snapshots=disk_bytes(run.method.bundle["student"], config.ema.post_hoc),
        )

    def _step(self, run: FakeRun, split: bool, leave: bool) -> StepCost:
        config, together = run.config, run.processes.forward_together
        what = config.model_dump(include={"model", "method", "roles", "ladder", "distill_method"})
        kind = (split, leave, together, config.parallel.activation_checkpointing)
        key = repr((what, config.data.batch_size, kind))
        if key not in self._steps:
            self._steps[key] = simulate(run, split=split, leave=leave)
        return self._steps[key]

    def _validation(self, run: FakeRun, gathered: int) -> int:
        key = repr((run.config.model_dump(include={"model", "validation", "data"}), run.processes.context, gathered))
        if key not in self._validations:
            self._validations[key] = validation_bytes(run.config, run.processes, gathered)
        return self._validations[key]


def encodes(config: Config) -> bool:
    """True if a run encodes prompts itself; a dataset is taken to hold its texts."""
    return config.data.prompts is not None or config.data.path in WORLDS


def _sent(run: FakeRun, roles: Sequence[RolePlan], step: StepCost) -> float:
    """Bytes per step and process, by ring algorithms."""
    parallel, micro = run.config.parallel, run.config.trainer.grad_accumulation
    shard, copies, sent = parallel.shard, run.processes.world_size // parallel.shard, 0.0
    for role in roles:
        forwards, backwards = step.calls[role.name] * micro, step.backwards[role.name] * micro
        updates = step.backwards[role.name] and min(1.0, step.backwards[role.name])
        if shard > 1 and role.block:
            reductions = backwards if parallel.sync_every_micro_batch else updates
            sent += (shard - 1) / shard * role.called * _gathers(run.config, role, forwards, backwards)
            sent += (shard - 1) * role.gradients * reductions
        sent += 2 * (copies - 1) / copies * role.gradients * updates
        if parallel.context > 1 and role.block:
            sent += _exchanged(run, role.name) * (forwards + backwards)
    return sent


def _gathers(config: Config, role: RolePlan, forwards: float, backwards: float) -> float:
    """Count how often a split network is put together in a step."""
    if not role.stays_gathered(config):
        return forwards + backwards
    return min(forwards, config.trainer.grad_accumulation) if role.network_trained else 0.0


def _exchanged(run: FakeRun, role: str) -> float:
    """Bytes that one forward sends to share attention among the processes of a sample."""
    family, context = run.families.by_role[role], run.processes.context
    assert family.scaling is not None
    counts = family.scaling.context_counts(None, family.codec.latent_shape)
    tokens = max(counts.values()) * run.config.data.batch_size / context
    item = family.folder.compute_dtype.itemsize
    return ALL_TO_ALL * tokens * sum(widths_of(family)) * item * (context - 1) / context
