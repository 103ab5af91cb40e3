"""State that survives a restart: nested state as named tensors and a rest for JSON; a role's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.checkpoint.storage import Index, Stored
from fastvideo.distillation.engine.optional.eight_bit import EightBit, entries, fill_moment, split_like
from fastvideo.distillation.engine.parallel.sharding import local
from fastvideo.distillation.engine.training import own_training, tensors_of, training_of

JOINT = "::"
NETWORK, EMA, POWERS, OPTIMIZER, SCHEDULE = "network", "ema", "powers", "optimizer", "lr_scheduler"


class Stateful(Protocol):
    """A part that survives a restart."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class PerProcess(Stateful, Protocol):
    """A part that differs between processes."""

    def load_foreign_state(self, state: Any, step: int) -> str:
        """Continue from the main process's state of a run with other processes, or another kind of device.

        Returns a note for the user on what is not bit-exact.
        """
        ...


def split_state(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested state into flat tensors (keys joined by ``::``, not copied) and a nested rest for JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping):
            inner, plain[str(key)] = split_state(value, f"{path}{JOINT}")
            tensors.update(inner)
        else:
            plain[str(key)] = value
    return tensors, plain


def join_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`split_state`, but for tuples, which JSON has made lists."""
    state = {key: join_state({}, value) if isinstance(value, Mapping) else value for key, value in plain.items()}
    for path, tensor in tensors.items():
        *parents, last = path.split(JOINT)
        node = state
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = tensor
    return state


class RoleState:
    """A trained role: the tensors that its training changes, its optimizer, its learning-rate schedule, its average.

    Optimizer state is keyed by parameter name, and kept only for parameters that have some: torch's own helpers would
    give a fresh optimizer one step at rate 0, which counts in Adam's bias correction. Every tensor may be a shard;
    nothing is gathered.
    """

    def __init__(self, handle: RoleHandle) -> None:
        self.handle = handle

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, not copies."""
        training, state = own_training(self.handle), dict[str, Any]({NETWORK: tensors_of(self.handle)})
        if training is None:
            return state
        if training.ema is not None:
            state[EMA] = dict(training.ema)
        if training.powers:
            state[POWERS] = dict(training.powers)
        state[OPTIMIZER] = self._optimizer_state(training.optimizer)
        if training.lr_scheduler is not None:
            state[SCHEDULE] = training.lr_scheduler.state_dict()
        return state

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.handle.named_parameters().items()}
        take = entries if isinstance(optimizer, EightBit) else lambda p, entry: dict(entry)
        state = {names[p]: take(p, entry) for p, entry in optimizer.state.items()}
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def targets(self, index: Index) -> dict[str, Tensor]:
        """Memory for each stored tensor (by its name within the role) that this run uses, sharded as its own."""
        training, parameters = own_training(self.handle), self.handle.named_parameters()
        averages = {} if training is None else {EMA: training.ema or {}, POWERS: training.powers}
        live = split_state({NETWORK: tensors_of(self.handle), **averages})[0]
        found: dict[str, Tensor] = {}
        for name, stored in index.items():
            kind, *path = name.split(JOINT)
            if name in live:
                found[name] = live[name].detach()
            elif kind == OPTIMIZER and training is not None:
                _, parameter, *entry = path
                found[name] = self._optimizer_target(parameters[parameter].detach(), entry, stored)
        return found

    def _optimizer_target(self, owner: Tensor, entry: Sequence[str], stored: Stored) -> Tensor:
        """Memory for a moment, sharded like its parameter ``owner``, or a step counter, on this optimizer's device."""
        if entry == ["step"]:
            group = training_of(self.handle).optimizer.param_groups[0]
            return stored.empty().to(owner.device if group.get("fused") or group.get("capturable") else "cpu")
        if tuple(owner.shape) == stored.shape:
            return torch.zeros_like(owner, dtype=getattr(torch, stored.dtype))
        if len(entry) > 1:  # a part of an 8-bit moment
            return split_like(owner, local(owner).new_zeros((len(local(owner)), *stored.shape[1:])))
        return stored.empty().to(owner.device)

    def problems(self, index: Index) -> list[str]:
        """Differences of the stored weights from this run's network; empty if they fit."""
        prefix = f"{NETWORK}{JOINT}"
        stored = {name.removeprefix(prefix): entry for name, entry in index.items() if name.startswith(prefix)}
        return mismatches(tensors_of(self.handle), stored)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken; the tensors are those of :meth:`targets`."""
        training = own_training(self.handle)
        fill(tensors_of(self.handle), state[NETWORK])
        if training is None:
            return
        if training.ema is not None:
            # A run that begins to average here starts from the live weights.
            fill(training.ema, state.get(EMA, state[NETWORK]))
        for name, power in training.powers.items():
            fill(power, state[POWERS][name])
        self._load_optimizer(training.optimizer, state[OPTIMIZER])
        if training.lr_scheduler is not None:
            training.resume_schedule(state[SCHEDULE])

    def _load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        parameters = self.handle.named_parameters()
        made = dict(optimizer.state)
        optimizer.state.clear()
        for name, entry in state["state"].items():
            owner = parameters[name]
            optimizer.state[owner] = {
                key: fill_moment(made[owner][key], value) if isinstance(value, Mapping) else value
                for key, value in entry.items()
            }
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            # JSON has made tuples lists.
            own = {k: tuple(v) if isinstance(group[k], tuple) else v for k, v in saved.items() if k != "params"}
            group.update(own)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy by name into existing tensors."""
    for name, tensor in tensors.items():
        tensor.copy_(source[name])


def mismatches(own: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> list[str]:
    """Differences of stored weights from a network's, in names and shapes; empty if they fit."""
    found = _listed("missing", own.keys() - stored.keys()) + _listed("unknown here", stored.keys() - own.keys())
    for name in sorted(own.keys() & stored.keys()):
        if tuple(own[name].shape) != stored[name].shape:
            found.append(f"{name} has shape {list(stored[name].shape)} instead of {list(own[name].shape)}")
    return found[:6] + ([f"and {len(found) - 6} more"] if len(found) > 6 else [])


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"] if names else []
