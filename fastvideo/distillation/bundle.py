"""``ModelBundle``: role name -> :class:`RoleHandle`. A role is one network with everything that belongs to it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvideo.distillation.features import FeatureModel, FeatureReader
from fastvideo.distillation.noise import guide, velocity_to_x0, x0_to_velocity
from fastvideo.distillation.types import Condition, UserError


class Training(Protocol):
    """Trains one role: an optimizer, its lr schedule, averages of the trained tensors by name."""

    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    ema: dict[str, Tensor] | None

    def step(self, skip: Tensor | None = None) -> None:
        """Move optimizer and schedule together; the optimizer changes nothing where ``skip`` (a scalar) is 1."""
        ...

    def take_back(self) -> None:
        """Undo the schedule's part of a skipped step."""
        ...

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        ...


class VelocityModel(FeatureModel, Protocol):
    """The part of an adapter that a role needs: its network's prediction in rectified-flow form."""

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        """Float32 ``E[noise - x0 | x_t]`` ``[B, C, F, H, W]`` at ``t`` in ``[0, 1]``, or its mean down to ``r``."""
        ...


def velocity_of(
    adapter: VelocityModel,
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    *,
    r: Tensor | None = None,
) -> Tensor:
    """A network's velocity, float32: the one way from training, validation and sampling to an adapter.

    With ``r`` it is a flow map's mean velocity from ``t`` down to ``r`` (``x_r = x_t - (t - r) u``).

    Given frames of the condition reach the network clean, at time 0, whatever ``x_t`` holds there. Their own velocity
    is known, ``(x_t - clean) / t``, so it is returned instead of a prediction: every formula on velocities (x0, noise,
    a step, guidance) is right for them too, and no gradient comes from them.
    """
    given = condition.given
    # Only a flow map is asked with r, so that a family without one need not know of it.
    down_to = {} if r is None else {"r": r if given is None else given.times(r)}
    if given is None:
        return adapter.velocity(network, x_t, t, condition, **down_to)
    u = adapter.velocity(network, given.fill(x_t), given.times(t), condition, **down_to)
    return x0_to_velocity(x_t, given.clean, t).to(u.dtype).where(given.frames, u)


@dataclass
class RoleHandle(FeatureReader):
    """One role: its adapter, its network, and (if it is trained) what trains it."""

    name: str
    adapter: VelocityModel
    network: nn.Module
    trainable: bool = False
    training: Training | None = None

    def __post_init__(self) -> None:
        self.network.requires_grad_(self.trainable)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None) -> Tensor:
        """The network's velocity, float32, or a flow map's mean velocity down to ``r``; see :func:`velocity_of`."""
        return velocity_of(self.adapter, self.network, x_t, t, condition, r=r)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """The sample at times ``r``: ``x_t - (t - r) u(x_t, t, r)``; given frames come as they are at ``r``."""
        return velocity_to_x0(x_t, self.velocity(x_t, t, condition, r=r), t - r)

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's estimate of the clean latents, float32; given frames are exact."""
        x0 = velocity_to_x0(x_t, self.velocity(x_t, t, condition), t)
        return x0 if condition.given is None else condition.given.fill(x0)

    def guided_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        negative: Condition,
        guidance: float,
        *,
        r: Tensor | None = None,
    ) -> Tensor:
        """Velocity under standard guidance; 1 is the conditional prediction and costs one call instead of two."""
        conditional = self.velocity(x_t, t, condition, r=r)
        if guidance == 1.0:
            return conditional
        return guide(self.velocity(x_t, t, negative, r=r), conditional, guidance)

    def x0_guided(self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition, guidance: float) -> Tensor:
        """Clean latents under standard guidance (guiding x0 or velocity is the same: both are affine in ``x_t``)."""
        x0 = velocity_to_x0(x_t, self.guided_velocity(x_t, t, condition, negative, guidance), t)
        return x0 if condition.given is None else condition.given.fill(x0)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this role trains, by their names in its network."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that this role trains."""
        return list(self.named_parameters().values())

    def tensors(self) -> dict[str, Tensor]:
        """What training changes, without graph: the trained parameters, and the buffers of a network trained whole.

        They share memory with the network, and are what a checkpoint and an average hold of this role.
        """
        state, trained = self.network.state_dict(), self.named_parameters()
        if len(trained) == sum(1 for _ in self.network.parameters()):
            return state
        return {name: state[name] for name in trained}


class ModelBundle:
    """The roles of a run, by name."""

    def __init__(self, handles: Sequence[RoleHandle]) -> None:
        self._handles = {handle.name: handle for handle in handles}

    def __getitem__(self, role: str) -> RoleHandle:
        return self._handles[role]

    def get(self, role: str) -> RoleHandle | None:
        """An optional role, if it is there."""
        return self._handles.get(role)

    def __contains__(self, role: str) -> bool:
        return role in self._handles

    def __iter__(self) -> Iterator[RoleHandle]:
        return iter(self._handles.values())

    @property
    def roles(self) -> tuple[str, ...]:
        """The names, in the order of the config."""
        return tuple(self._handles)

    def require_roles(
        self, roles: Sequence[str], *, trainable: Sequence[str] | None = None, optional: Sequence[str] = ()
    ) -> None:
        """Check that the bundle holds exactly what a method needs.

        Args:
            roles: every role that must be there.
            trainable: those of them that must be trained; all others must be frozen. ``None`` skips that check.
            optional: further roles that may be there.

        Raises:
            UserError: one message that lists every missing, unknown and wrongly frozen or trained role.
        """
        check_roles({h.name: h.trainable for h in self}, roles, trainable, optional)


def check_roles(
    given: Mapping[str, bool],
    roles: Sequence[str],
    trainable: Sequence[str] | None = None,
    optional: Sequence[str] = (),
) -> None:
    """The rule behind :meth:`ModelBundle.require_roles`, on ``name -> trainable``, so a config is checked early."""
    problems = [f"role {role!r} is missing" for role in roles if role not in given]
    known = (*roles, *optional)
    problems += [f"role {role!r} is unknown to this method" for role in given if role not in known]
    for role in known if trainable is not None else ():
        must_train = role in (trainable or ())
        if role in given and given[role] != must_train:
            want, found = ("trained", "frozen") if must_train else ("frozen", "trainable")
            problems.append(f"role {role!r} must be {want}, but is {found}")
    if problems:
        needed = ", ".join([*roles, *(f"{role} (optional)" for role in optional)])
        raise UserError(f"roles: {'; '.join(problems)}. Needed: {needed}; given: {', '.join(given) or 'none'}")
