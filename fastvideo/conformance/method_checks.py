"""Checks of a method: its losses against what it declares, its draws, and the independence of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.conformance.method_subject import STEPS, MethodSubject, Seen, backward
from fastvideo.conformance.subject import Check, NotApplicable, check, require
from fastvideo.distillation.types import RoleLoss, UserError

METHOD_CHECKS: list[Check] = []
"""Every rule of a method, in the order of the report."""


def _said(loss: RoleLoss, step: int) -> str:
    return f"step {step}, the loss of role {loss.role!r}"


@check("summary, trainable_roles, frozen_roles, optimizers", METHOD_CHECKS)
def it_declares_itself(subject: MethodSubject) -> None:
    cls = subject.examined
    require(bool(cls.summary.strip()), "summary is empty")
    require(bool(cls.trainable_roles), "trainable_roles is empty")
    both = sorted(set(cls.trainable_roles) & set(cls.frozen_roles))
    require(not both, f"{', '.join(both)} are trainable_roles and frozen_roles")
    found = sorted(cls.optimizers(subject.config))
    require(found == sorted(cls.trainable_roles), f"optimizers are of {found}, trainable_roles {cls.trainable_roles}")


@check("active_roles, losses", METHOD_CHECKS)
def every_active_role_and_no_other_gets_a_loss(subject: MethodSubject) -> None:
    found = [(step, loss.role, method.active_roles(step)) for method, step, loss in subject.losses()]
    for step in STEPS:
        roles, active = (
            {role for at, role, _ in found if at == step},
            {r for at, _, a in found if at == step for r in a},
        )
        require(
            bool(roles) and roles == active, f"step {step}: losses for {sorted(roles)}, active are {sorted(active)}"
        )


@check("losses", METHOD_CHECKS)
def a_loss_is_a_finite_scalar_with_scalar_metrics_off_the_graph(subject: MethodSubject) -> None:
    for _, step, loss in subject.losses():
        said, value = _said(loss, step), loss.value
        require(value.shape == () and value.dtype == torch.float32, f"{said}: {list(value.shape)}, {value.dtype}")
        require(value.isfinite(), f"{said}: {value.item()}")
        require(value.requires_grad, f"{said}: no gradient")
        for name, metric in loss.metrics.items():
            require(metric.shape == (), f"{said}: metric {name!r} has shape {list(metric.shape)}")
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
def the_gradient_mode_never_leaks_to_the_trainer(subject: MethodSubject) -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for _, step, loss in subject.losses():
                require(torch.is_grad_enabled() == enabled, f"{_said(loss, step)}: changed where it is yielded")


@check("losses", METHOD_CHECKS)
def frozen_roles_stay_the_same_to_the_bit(subject: MethodSubject) -> None:
    before = dict[str, list[Tensor]]()
    for method, step, loss in subject.losses():
        frozen = [handle for handle in method.bundle if handle.name not in subject.examined.trainable_roles]
        now = {handle.name: [value.clone() for value in handle.network.state_dict().values()] for handle in frozen}
        before = before or now
        wrong = [role for role, own in now.items() if not all(map(torch.equal, own, before[role]))]
        require(not wrong, f"step {step} changed frozen roles: {', '.join(wrong)}")
        backward(method, loss)


@check("losses: self.rng", METHOD_CHECKS)
def draws_come_from_the_methods_own_streams(subject: MethodSubject) -> None:
    before = torch.get_rng_state()
    values = [[float(loss.value.detach()) for *_, loss in subject.losses(seed=seed)] for seed in (1, 1, 2)]
    require(torch.equal(torch.get_rng_state(), before), "it drew from torch's global stream; draw from self.rng")
    require(values[0] == values[1], "the same seed gives other losses")
    require(values[0] != values[2], "another seed gives the same losses")


@check("uses_latents", METHOD_CHECKS)
def latents_are_asked_for_where_they_are_used_and_nowhere_else(subject: MethodSubject) -> None:
    if subject.examined.needs_trajectories:
        raise NotApplicable("it trains on trajectories, which a run refuses to begin without")
    uses, refused = subject.examined.uses_latents(subject.config), ""
    try:
        list(subject.losses(latents=False))
    except UserError as error:
        refused = str(error)
    require(not uses or bool(refused), f"uses_latents is True, and {len(STEPS)} steps read no batch.latents")
    require(uses or not refused, f"uses_latents is False, and prompts alone: {refused}")


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
