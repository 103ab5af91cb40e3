"""Checks of a method: its losses against what it declares, its draws, and the independence of samples."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from fastvideo.conformance.method_subject import STEPS, MethodSubject, Seen, backward, losses_of, obey_the_trainer
from fastvideo.conformance.subject import Check, NotApplicable, check, require
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.types import RoleLoss

METHOD_CHECKS: list[Check] = []
"""Every rule of a method, in the order of the report."""


def _said(loss: RoleLoss, step: int) -> str:
    return f"step {step}, the loss of role {loss.role!r}"


@check("summary, sampler, trainable_roles, frozen_roles, averaged_roles, optimizers", METHOD_CHECKS)
def it_declares_itself(subject: MethodSubject) -> None:
    cls, samplers = subject.examined, get_args(SamplerKind)
    for name in ("trainable_roles", "frozen_roles", "optional_roles", "averaged_roles"):
        roles: object = getattr(cls, name, ())
        require(isinstance(roles, tuple), f"{name} is {roles!r}, expected a tuple, such as ('student',)")
    require(bool(getattr(cls, "summary", "").strip()), "summary is empty")
    sampler = getattr(cls, "sampler", None)
    require(sampler in samplers, f"sampler is {sampler!r}, expected one of {', '.join(samplers)}")
    require(bool(getattr(cls, "trainable_roles", ())), "trainable_roles is empty")
    both = sorted(set(cls.trainable_roles) & set(cls.frozen_roles))
    require(not both, f"{', '.join(both)} are trainable_roles and frozen_roles")
    others = sorted(set(cls.averaged_roles) - set(cls.trainable_roles))
    require(not others, f"averaged_roles name {', '.join(others)}, expected some of {cls.trainable_roles}")
    found = sorted(cls.optimizers(subject.config))
    require(found == sorted(cls.trainable_roles), f"optimizers are of {found}, trainable_roles {cls.trainable_roles}")


@check("active_roles, losses", METHOD_CHECKS)
def every_active_role_and_no_other_gets_a_loss(subject: MethodSubject) -> None:
    method, batch = subject.begun()
    for step in STEPS:
        roles, active = {loss.role for loss in losses_of(method, batch, step)}, set(method.active_roles(step))
        require(
            bool(roles) and roles == active, f"step {step}: losses for {sorted(roles)}, active are {sorted(active)}"
        )


@check("losses", METHOD_CHECKS)
def a_loss_is_a_finite_scalar_with_scalar_metrics_off_the_graph(subject: MethodSubject) -> None:
    for _, step, loss in subject.losses():
        said, value = _said(loss, step), loss.value
        obey_the_trainer(loss, step, (loss.role,))
        require(value.dtype == torch.float32, f"{said} is a {value.dtype} scalar, expected a float32 scalar")
        require(value.isfinite(), f"{said} is {value.item()}, expected a finite number")
        for name, metric in loss.metrics.items():
            require(not metric.requires_grad, f"{said}: metric {name!r} is not detached, and keeps the graph")


@check("losses, RoleLoss.frozen", METHOD_CHECKS)
def backward_of_a_loss_reaches_its_role_alone(subject: MethodSubject) -> None:
    for method, step, loss in subject.losses():
        backward(method, loss)
        reached = {h.name for h in method.bundle for p in h.network.parameters() if p.grad is not None}
        hint = "; name the others in RoleLoss(frozen=...), or detach" if reached - {loss.role} else ""
        require(reached == {loss.role}, f"{_said(loss, step)} reaches {sorted(reached) or 'none'}{hint}")
        method.bundle[loss.role].network.zero_grad()


@check("losses: no yield inside a with", METHOD_CHECKS)
def no_mode_leaks_to_the_trainer(subject: MethodSubject) -> None:
    with torch.enable_grad():
        for method, step, loss in subject.moments():
            when = f"{_said(loss, step)}: where it is yielded" if loss else f"step {step}: around it"
            require(torch.is_grad_enabled(), f"{when}, gradients are switched off")
            require(not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))), f"{when}, autocast is on")
            frozen = {h.name for h in method.bundle for p in h.network.parameters() if p.requires_grad != h.trainable}
            require(
                not frozen, f"{when}, {', '.join(sorted(frozen))} is frozen or freed; name it in RoleLoss(frozen=...)"
            )


@check("losses", METHOD_CHECKS)
def frozen_roles_stay_the_same_to_the_bit(subject: MethodSubject) -> None:
    before, generator = dict[str, list[Tensor]](), seeded(1)
    for method, step, loss in subject.moments():
        frozen = [handle for handle in method.bundle if not handle.trainable]
        now = {handle.name: [value.clone() for value in handle.network.state_dict().values()] for handle in frozen}
        before = before or now
        wrong = [role for role, own in now.items() if not all(map(torch.equal, own, before[role]))]
        require(not wrong, f"step {step} changed frozen roles: {', '.join(wrong)}")
        if loss is None:
            _move(method, generator)
        else:
            backward(method, loss)


@torch.no_grad()
def _move(method: DistillMethod[Any], generator: torch.Generator) -> None:
    """Trained roles a little away, as by an optimizer, so that a copy of one is no copy of its start."""
    for handle in method.bundle:
        for parameter in handle.parameters() if handle.trainable else ():
            parameter.add_(normal(tuple(parameter.shape), generator), alpha=0.01)


@check("losses: self.rng", METHOD_CHECKS)
def draws_come_from_the_methods_own_streams(subject: MethodSubject) -> None:
    before = torch.get_rng_state()
    values, used = [], False
    for seed in (1, 1, 2):
        found = []
        for method, step, loss in subject.losses(seed=seed):
            found.append(_flat(method, loss))
            require(found[-1].isfinite().all(), f"{_said(loss, step)}, or its gradient, is not finite")
            new = RandomStreams(seed).state_dict().values()
            used = used or not all(map(torch.equal, method.rng.state_dict().values(), new))
        values.append(torch.cat(found))
    require(torch.equal(torch.get_rng_state(), before), "it drew from torch's global stream; draw from self.rng")
    require(torch.equal(values[0], values[1]), "the same seed gives other losses")
    if not used:
        raise NotApplicable("it draws nothing from self.rng")
    require(not torch.equal(values[0], values[2]), "another seed gives the same losses and gradients")


def _flat(method: DistillMethod[Any], loss: RoleLoss) -> Tensor:
    """A loss, and the gradients that it leaves its role."""
    network = method.bundle[loss.role].network
    network.zero_grad()
    backward(method, loss)
    gradients = [p.grad.detach().flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat([loss.value.detach().view(1), *gradients])


@check("uses_latents", METHOD_CHECKS)
def latents_are_asked_for_where_they_are_used_and_nowhere_else(subject: MethodSubject) -> None:
    if subject.examined.needs_trajectories:
        raise NotApplicable("it trains on trajectories, which a run refuses to begin without")
    uses, refused, alone = subject.examined.uses_latents(subject.config), "", list[float]()
    both = [float(loss.value.detach()) for *_, loss in subject.losses(later=True)]  # errors here are not about latents
    try:
        alone += [float(loss.value.detach()) for *_, loss in subject.losses(latents=False, later=True)]
    except Exception as error:  # None where a tensor was expected may raise anything
        refused = f"{type(error).__name__}: {error}"
    require(uses or not refused, f"uses_latents is False, and without latents: {refused}")
    unread = uses and not refused and alone == both
    later = "or it reads them only at other steps: give shorter intervals with --set"
    require(not unread, f"uses_latents is True, and no step that was taken read batch.latents or x0, {later}")


@check("losses: batch.mean, mean_over_generated", METHOD_CHECKS)
def a_sample_does_not_feel_another_one(subject: MethodSubject) -> None:
    found = []
    for last in ("1", "50"):
        seen = Seen()
        for method, _, loss in subject.losses(("0", "0.5", last), seen=seen):
            backward(method, loss)
        found.append([output.grad[:2] for output in seen if output.grad is not None])
    require(bool(found[0]), "no gradient reached a velocity, so nothing was compared")
    same = len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
    require(same, "gradients of two samples change with a third: something is averaged or normalised over the batch")
