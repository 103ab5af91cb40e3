"""``ModelBundle``: role name -> :class:`RoleHandle`. A role is a denoiser with everything that belongs to it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastvideo.distillation.denoiser import Denoiser, Family
from fastvideo.errors import UserError

Bridge = Callable[[Tensor], Tensor]
"""Clean latents ``[B, C, F, H, W]`` of one space to those of another; differentiable."""


def same_space(x0: Tensor) -> Tensor:
    """The bridge inside one latent space: the identity."""
    return x0


class Training(Protocol):
    """Trainer of one role; the engine's."""

    lr_scheduler: LRScheduler | None

    def averaged(self, handle: RoleHandle) -> AbstractContextManager[None]:
        """Give the role its averaged weights inside."""
        ...


class RoleHandle(Denoiser):
    """One role: a denoiser under a name, and (if it is trained) what trains it.

    Args:
        name: of the role.
        adapter, network, select: as for :class:`Denoiser`.
        trainable: whether the role is trained.
        trained: the parameters that it trains, by name, for a role that trains a part of a shared network; all
            parameters of the network otherwise.
        training: optimizer, lr schedule and averages of a trained role.
    """

    is_head = False
    """True for a network of the method's own (``DistillMethod.heads``), which answers no velocity."""

    def __init__(
        self,
        name: str,
        adapter: Family,
        network: nn.Module,
        trainable: bool = False,
        *,
        select: Callable[[], None] | None = None,
        trained: Mapping[str, nn.Parameter] | None = None,
        training: Training | None = None,
    ) -> None:
        super().__init__(adapter, network, select)
        self.name, self.trainable, self._trained = name, trainable, trained
        self.training = training
        if trained is None:
            network.requires_grad_(trainable)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters, by their names in the network (an adapter's under diffusers' names)."""
        if self._trained is not None:
            return dict(self._trained)
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def shares_network(self) -> bool:
        """True if other roles hold the same network, so that this one owns its adapter alone (or nothing)."""
        return self._trained is not None

    def averaged(self) -> AbstractContextManager[None]:
        """Give the role its averaged weights inside, for forwards without gradient; the live ones if it has no average.

        Forwards with gradient begin after it.
        """
        return nullcontext() if self.training is None else self.training.averaged(self)

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        return list(self.named_parameters().values())


@contextmanager
def frozen(handles: Sequence[RoleHandle]) -> Iterator[None]:
    """Freeze the trained parameters of some roles inside: gradient flows through them and not to them."""
    held = [parameter for handle in handles for parameter in handle.parameters()]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


class ModelBundle:
    """The roles of a run, by name.

    Args:
        handles: the roles.
        bridges: between roles whose latent spaces differ.
    """

    def __init__(self, handles: Sequence[RoleHandle], bridges: Mapping[tuple[str, str], Bridge] | None = None) -> None:
        self._handles, self._bridges = {handle.name: handle for handle in handles}, dict(bridges or {})

    def bridge(self, source: str, target: str) -> Bridge:
        """From one role's latent space to another's; the identity where they are one."""
        return self._bridges.get((source, target), same_space)

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
