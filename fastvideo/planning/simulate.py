"""A step of the real method over fake tensors: they have shapes and no memory, so a laptop runs a 14B step.

The networks, the method and autograd are those of a run. What is alive at the same time is what the run will hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastvideo.distillation.builder import Config, Method
from fastvideo.distillation.bundle import frozen
from fastvideo.distillation.engine.optional.counting import Counter
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.experts import networks_of
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.types import Batch
from fastvideo.planning.fake import FakeRun, LiveBytes, WorstCase, drop_gradients, fake_run, one_thread, stacks

DEPTHS = (2, 4)
"""Blocks of the networks that are run in place of deep ones, for memory."""
FEWER = (1, 2)
"""Blocks that are run to count operations, which take longer and are exactly linear."""
LONGEST_PERIOD = 1000
"""Steps after which the roles that train must have come round."""


@dataclass(frozen=True)
class StepCost:
    """Work and memory of a process in a step, beyond parameters, optimizers and averages.

    Attributes:
        peaks: bytes alive at once while the loss of a role is made and differentiated, gradients among them.
        flops: floating point operations of matrix products and attention, a mean over steps and choices.
        attention: part of them that is attention, 0 to 1; one that is differentiated forward counts as products.
        calls: forwards of each role's network, likewise.
        backwards: backward passes of each role's network, likewise.
    """

    peaks: Mapping[str, int]
    flops: float
    attention: float
    calls: Mapping[str, float]
    backwards: Mapping[str, float]


def simulate(run: FakeRun, *, split: bool, leave: bool) -> StepCost:
    """Run one micro-batch's losses and backward passes, of every kind of step.

    A deep network is run at two small depths, and what it holds and computes goes on linearly from there: its blocks
    are alike. A method that reads features of certain blocks is run at full depth, which takes minutes for a large one.

    Args:
        run: the run at full depth.
        split: parameters have the compute dtype, as those of sharded networks do.
        leave: gradients are counted elsewhere, and leave at once.
    """
    config, whole_roles, kind = run.config, _whole(run.config), Kind(run.processes, split, leave)
    depths = {
        handle.name: len(stacks(networks_of(handle.network)[0])[0])
        for handle in run.method.bundle
        if run.placement(handle)
    }
    taps = "features" in load_method(config.distill_method).needs_of(config.method)
    whole = taps or max(depths.values()) <= DEPTHS[1]
    with one_thread(), warnings.catch_warnings():
        # Norms stay in float32 in diffusers; here they only are counted.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        peaks = [_peaks(config, kind, depth) for depth in ((None,) if whole else DEPTHS)]
        runs = [_operations(whole_roles, kind, depth) for depth in ((None,) if whole else FEWER)]
        calls, backwards = _counts(whole_roles, kind, None if whole else FEWER[0])
    trained = max(depths.get(name, 1) for name, role in config.roles.items() if role.trainable)
    forward = {role: at_depth(depths.get(role, FEWER[0]), FEWER, [run.forward[role] for run in runs]) for role in calls}
    backward = at_depth(trained, FEWER, [run.backward for run in runs])
    return StepCost(
        peaks={role: int(at_depth(trained, DEPTHS, [found[role] for found in peaks])) for role in peaks[0]},
        flops=sum(calls[role] * forward[role] for role in calls) + sum(backwards.values()) * backward,
        attention=at_depth(trained, FEWER, [run.attention for run in runs])
        / at_depth(trained, FEWER, [run.total for run in runs]),
        calls=calls,
        backwards=backwards,
    )


def _whole(config: Config) -> Config:
    """The config without adapters, whose arithmetic is small: hooks on a network count for one role, not for all."""
    roles = {name: role.model_copy(update={"lora": None}) for name, role in config.roles.items()}
    return config.model_copy(update={"roles": roles})


def at_depth(depth: int, at: tuple[int, int], measured: Sequence[float]) -> float:
    """The value at a depth, on the line through those measured ``at`` two depths; the only one where there is one."""
    if len(measured) == 1:
        return measured[0]
    low, high = measured
    return low + (high - low) * (depth - at[0]) / (at[1] - at[0])


@dataclass(frozen=True)
class Kind:
    """Layout of a step: its processes, whether networks are split, and whether gradients leave at once."""

    processes: Processes
    split: bool
    leave: bool


def _peaks(config: Config, kind: Kind, depth: int | None) -> dict[str, int]:
    """Bytes alive at once for the loss of each role, in the first step that trains it, with its longest choices."""
    peaks = dict[str, int]()
    with _ready(config, kind, depth) as (method, batch), LiveBytes() as memory:

        def keep(role: str) -> None:
            peaks[role] = max(memory.peak, peaks.get(role, 0))
            memory.peak = memory.live

        for step in _first_steps(method, config.trainer.max_steps):
            _train(method, batch, step, keep)
    return peaks


@dataclass(frozen=True)
class _Operations:
    """Operations of a forward of each role, and of a backward; of the whole step, and those of attention in it."""

    forward: Mapping[str, float]
    backward: float
    total: int
    attention: int


def _operations(config: Config, kind: Kind, depth: int | None) -> _Operations:
    """Operations of the same steps, counted apart: their counter holds on to what recomputation would have freed."""
    counter = Counter()
    with _ready(config, kind, depth) as (method, batch):
        spent, calls = dict.fromkeys(method.bundle.roles, 0), dict.fromkeys(method.bundle.roles, 0)
        for handle in method.bundle:
            _count_forwards(handle.network, counter, spent, calls, handle.name)
        with counter:
            steps = [_train(method, batch, step) for step in _first_steps(method, config.trainer.max_steps)]
    rest = counter.total - sum(spent.values())
    forward = {name: spent[name] / max(calls[name], 1) for name in spent}
    backwards = sum(sum(trained.values()) for trained in steps)
    return _Operations(forward, rest / max(backwards, 1), counter.total, counter.attention)


@contextmanager
def _ready(config: Config, kind: Kind, depth: int | None) -> Iterator[tuple[Method, Batch]]:
    """Method and batch of fake tensors."""
    run = fake_run(config, kind.processes, depth=depth, gathered=kind.split)
    with run.mode:
        if kind.leave:
            drop_gradients(run.method)
        yield run.method, run.batch()


def _count_forwards(
    network: nn.Module, counter: Counter, spent: dict[str, int], calls: dict[str, int], name: str
) -> None:
    """Add the operations of every forward to ``spent[name]``, and 1 to ``calls[name]``."""

    def before(*_: Any) -> None:
        spent[name] -= counter.total

    def after(*_: Any) -> None:
        spent[name] += counter.total
        calls[name] += 1

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)


def _counts(config: Config, kind: Kind, depth: int | None) -> tuple[dict[str, float], dict[str, float]]:
    """Forwards and backwards of each role per step: a mean over steps, and over the choices that a step draws."""
    with _ready(config, kind, depth) as (method, batch):
        forwards, backwards = dict.fromkeys(method.bundle.roles, 0.0), dict.fromkeys(method.bundle.roles, 0.0)
        assert isinstance(method.rng, WorstCase)
        for step, of_steps in _shares(method, config.trainer.max_steps).items():
            for method.rng.longest in (True, False):
                called = dict.fromkeys(method.bundle.roles, 0)
                hooks = [h.network.register_forward_hook(_adder(called, h.name)) for h in method.bundle]
                trained = _train(method, batch, step)
                for hook in hooks:
                    hook.remove()
                share = of_steps * method.rng.share
                for role in method.bundle.roles:
                    forwards[role] += share * called[role]
                    backwards[role] += share * trained[role]
    return forwards, backwards


def _first_steps(method: Method, steps: int) -> list[int]:
    """The first step that trains each role."""
    shares, trained = _shares(method, steps), set[str]()
    found = []
    for step in shares:
        if not trained >= (active := set(method.active_roles(step))):
            found.append(step)
            trained |= active
    return found


def _shares(method: Method, steps: int) -> dict[int, float]:
    """A step of each kind with the share of its kind: of the first period, or of all ``steps`` if that lacks a role."""
    first = method.active_roles(0)
    period = next((step for step in range(1, LONGEST_PERIOD) if method.active_roles(step) == first), LONGEST_PERIOD)
    if {role for step in range(min(period, 2)) for role in method.active_roles(step)} >= set(method.trainable_roles):
        return {0: 1 / period, 1: (period - 1) / period} if period > 1 else {0: 1.0}
    kinds: dict[tuple[str, ...], list[int]] = {}
    for step in range(steps):
        kinds.setdefault(method.active_roles(step), []).append(step)
    return {own[0]: len(own) / steps for own in kinds.values()}


def _train(method: Method, batch: Batch, step: int, after: Callable[[str], None] | None = None) -> dict[str, int]:
    """The losses of one step with their backward passes, and how many of these each role had.

    Args:
        after: called with the role of each loss, once its graph is gone.
    """
    backwards = dict.fromkeys(method.bundle.roles, 0)
    for loss in method.losses(batch, step):
        with frozen([method.bundle[role] for role in loss.frozen]):
            loss.value.backward()
        backwards[role := loss.role] += 1
        del loss
        if after is not None:
            after(role)
    for handle in method.bundle:
        handle.network.zero_grad(set_to_none=True)
    return backwards


def _adder(counts: dict[str, int], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        counts[name] += 1

    return hook
