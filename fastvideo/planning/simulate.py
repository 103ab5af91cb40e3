"""A step of the real method over fake tensors: they have shapes and no memory, so a laptop runs a 14B step.

The networks, the method and autograd are those of a run. What is alive at the same time is what the run will hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvideo.distillation.builder import Adapter, Config, Method
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.engine.parallel.recompute import checkpointed
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import initialising
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Batch, UserError
from fastvideo.planning.fake import (
    CPU_ATTENTION,
    LiveBytes,
    WorstCase,
    drop_gradients,
    fake_batch,
    fake_network,
    fake_text,
    one_thread,
)

DEPTHS = (2, 4)
"""Blocks of the networks that are run in place of deep ones."""
LONGEST_PERIOD = 1000
"""Steps after which the roles that train must have come round."""


@dataclass(frozen=True)
class StepCost:
    """What a process does and holds in a step, beyond parameters, optimizers and averages.

    Attributes:
        peak: bytes alive at once, gradients among them.
        flops: floating point operations of matrix products and attention, a mean over steps and choices.
        calls: forwards of each role's network, likewise.
        backwards: backward passes of each role's network, likewise.
    """

    peak: int
    flops: float
    calls: Mapping[str, float]
    backwards: Mapping[str, float]


def simulate(config: Config, adapter: Adapter, *, split: bool, leave: bool) -> StepCost:
    """Run one micro-batch's losses and backward passes, of every kind of step.

    A deep network is run at two small depths, and what it holds and computes goes on linearly from there: its blocks
    are alike. A method that reads features of certain blocks is run at full depth, which takes minutes for a large one.

    Args:
        config: the run; its model paths are folders with config files.
        adapter: the family, on the CPU.
        split: whether networks are sharded: parameters then have the compute dtype.
        leave: whether gradients are counted elsewhere, and leave at once.

    Raises:
        UserError: for a family without networks of a size.
    """
    if adapter.scaling is None:
        raise UserError(f"plan: {config.distill_model} has no networks whose size is worth a plan")
    depths = _depths(config, adapter)
    taps = "features" in load_method(config.distill_method).needs_of(config.method)
    whole = taps or max(depths.values()) <= DEPTHS[1]
    kind, at_depths = Kind(split, leave), (None,) if whole else DEPTHS
    with one_thread():
        runs = [_measure(config, adapter, kind, depth) for depth in at_depths]
        calls, backwards = _counts(config, adapter, kind, None if whole else 1)
    trained = max(depths.get(name, 1) for name, role in config.roles.items() if role.trainable)
    forward = {role: _at(depths.get(role, DEPTHS[0]), [run.forward[role] for run in runs]) for role in calls}
    backward = _at(trained, [run.backward for run in runs])
    return StepCost(
        peak=int(_at(trained, [run.peak for run in runs])),
        flops=sum(calls[role] * forward[role] for role in calls) + sum(backwards.values()) * backward,
        calls=calls,
        backwards=backwards,
    )


def _depths(config: Config, adapter: Adapter) -> dict[str, int]:
    """Blocks of each role's network that the family loads."""
    assert adapter.scaling is not None
    own = load_method(config.distill_method).heads(config.method, dict.fromkeys(config.roles, adapter))
    family = {name: role for name, role in config.roles.items() if name not in own}
    return {name: len(_stack(adapter.folder.empty(role.path, torch.float32))) for name, role in family.items()}


def _stack(network: nn.Module) -> nn.ModuleList:
    """The list of a network's repeated blocks."""
    return max((m for m in network.modules() if isinstance(m, nn.ModuleList)), key=len)


def _at(depth: int, measured: Sequence[float]) -> float:
    """The value at a depth, on the line through those at :data:`DEPTHS`; the only one where there is one."""
    if len(measured) == 1:
        return measured[0]
    low, high = measured
    return low + (high - low) * (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])


def _networks(config: Config, adapter: Adapter, split: bool, depth: int | None) -> dict[str, nn.Module]:
    """Every role's network, its parameters on the meta device, with its first ``depth`` blocks or all."""
    method = load_method(config.distill_method)
    with initialising(config.seed):
        networks = dict(method.heads(config.method, dict.fromkeys(config.roles, adapter)))
    for name, role in config.roles.items():
        if name in networks:
            continue
        assert adapter.scaling is not None
        dtype = adapter.folder.compute_dtype if split or not role.trainable else torch.float32
        networks[name] = network = adapter.folder.empty(role.path, dtype)
        if depth is not None:
            del _stack(network)[depth:]
        if name == "student" and "flow_map" in method.needs_of(config.method):
            adapter.folder.add_flow_map(network)
        if config.parallel.activation_checkpointing != "none":
            adapter.scaling.recompute(network, checkpointed(config.parallel.activation_checkpointing))
    return networks


def _method(config: Config, adapter: Adapter, networks: Mapping[str, nn.Module], leave: bool) -> Method:
    method, handles = load_method(config.distill_method), []
    for name, role in config.roles.items():
        network = fake_network(networks[name], role.trainable)
        if leave and role.trainable:
            drop_gradients(network)
        handles.append(RoleHandle(name, adapter, network, role.trainable))
    adapter.conditioner.ensure_negative_conditioning(fake_text(adapter.conditioner, 1))
    return method(config.method, ModelBundle(handles), Ladder(config.ladder.times), WorstCase(config.seed))


def _period(method: Method) -> int:
    first = method.active_roles(0)
    return next((step for step in range(1, LONGEST_PERIOD) if method.active_roles(step) == first), LONGEST_PERIOD)


@dataclass(frozen=True)
class Kind:
    """Whether networks are split, and whether gradients leave at once."""

    split: bool
    leave: bool


@dataclass(frozen=True)
class _Run:
    """Of one step: bytes alive at once, operations of a forward of each role, operations of a backward."""

    peak: int
    forward: Mapping[str, float]
    backward: float


def _measure(config: Config, adapter: Adapter, kind: Kind, depth: int | None) -> _Run:
    """The first step, which trains every role, with the longest of its choices.

    Bytes and operations are counted apart: the counter of operations holds on to what recomputation would have freed.
    """
    with _ready(config, adapter, kind, depth) as (method, batch, _), LiveBytes() as memory:
        _train(method, batch, 0)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with _ready(config, adapter, kind, depth) as (method, batch, networks):
        spent, calls = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0)
        for name, network in networks.items():
            _count_forwards(network, counter, spent, calls, name)
        with counter:
            backwards = _train(method, batch, 0)
    rest = counter.get_total_flops() - sum(spent.values())
    forward = {name: spent[name] / max(calls[name], 1) for name in networks}
    return _Run(memory.peak, forward, rest / max(sum(backwards.values()), 1))


@contextmanager
def _ready(
    config: Config, adapter: Adapter, kind: Kind, depth: int | None
) -> Iterator[tuple[Method, Batch, Mapping[str, nn.Module]]]:
    """Method, batch and networks of fake tensors."""
    networks = _networks(config, adapter, kind.split, depth)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield _method(config, adapter, networks, kind.leave), fake_batch(config, adapter), networks


def _count_forwards(
    network: nn.Module, counter: FlopCounterMode, spent: dict[str, int], calls: dict[str, int], name: str
) -> None:
    """Add the operations of every forward to ``spent[name]``, and 1 to ``calls[name]``."""

    def before(*_: Any) -> None:
        spent[name] -= counter.get_total_flops()

    def after(*_: Any) -> None:
        spent[name] += counter.get_total_flops()
        calls[name] += 1

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)


def _counts(
    config: Config, adapter: Adapter, kind: Kind, depth: int | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Forwards and backwards of each role per step: a mean over steps, and over the choices that a step draws."""
    with _ready(config, adapter, kind, depth) as (method, batch, networks):
        forwards, backwards = dict.fromkeys(networks, 0.0), dict.fromkeys(networks, 0.0)
        assert isinstance(method.rng, WorstCase)
        period = _period(method)
        for step in range(min(period, 2)):
            for method.rng.longest in (True, False):
                share = (1 if step == 0 else period - 1) / period / 2
                hooks = [n.register_forward_hook(_adder(forwards, name, share)) for name, n in networks.items()]
                for role, count in _train(method, batch, step).items():
                    backwards[role] += share * count
                for hook in hooks:
                    hook.remove()
    return forwards, backwards


def _train(method: Method, batch: Batch, step: int) -> dict[str, int]:
    """The losses of one step with their backward passes; how many of these each role had."""
    backwards = dict.fromkeys(method.bundle.roles, 0)
    for loss in method.losses(batch, step):
        loss.value.backward()
        backwards[loss.role] += 1
        del loss
    for handle in method.bundle:
        handle.network.zero_grad(set_to_none=True)
    return backwards


def _adder(counts: dict[str, float], name: str, share: float) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        counts[name] += share

    return hook
