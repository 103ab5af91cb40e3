"""Checks of a run whose models have two experts, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.config.schema import RunConfig
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.experts import SUPPORTS, check_boundary
from fastvideo.distillation.frame_bridge import ScoresFrames
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.types import UserError


def check_experts(
    config: RunConfig[Any, Any], by_role: Mapping[str, DistillAdapter[Any]], processes: Processes
) -> None:
    """Check method, ladder and layout against the experts of the roles' models.

    Raises:
        UserError: if a method needs more than an expert has, a step of the ladder is on a boundary, roles that score
            the same samples have different boundaries, or processes would call different experts.
    """
    found = {role: of_folder(family.folder).boundary(config.roles[role].path) for role, family in by_role.items()}
    boundaries = {role: boundary for role, boundary in found.items() if boundary is not None}
    if not boundaries:
        return
    _check_needs(config, by_role)
    if "student" in boundaries:
        check_boundary(config.ladder.times, boundaries["student"], "ladder.times")
    scoring = {boundaries[role] for role in ("teacher", "critic") if role in boundaries}
    if len(scoring) > 1:
        raise UserError(
            f"roles.critic: its experts change at {boundaries['critic']:g}, the teacher's at "
            f"{boundaries['teacher']:g}, and both score the same samples: give both one boundary_ratio"
        )
    if processes.world_size > 1:
        _check_calls(config, boundaries, processes.world_size)


def _check_calls(config: RunConfig[Any, Any], experts: Collection[str], processes: int) -> None:
    """Processes that share networks call the same expert; ``experts`` are the roles that have two."""
    method = load_method(config.distill_method)
    mixing = f"so that {processes} processes would call different experts and wait for each other for ever"
    if getattr(config.method, "rollout", "simulate") not in method.one_expert_rollouts:
        methods = {name: load_method(name) for name in METHODS}
        able = [name for name, m in methods.items() if m.one_expert_rollouts and m.needs_of(m.Config()) <= SUPPORTS]
        raise UserError(
            f"{config.distill_method} draws a time of its own for every sample, {mixing}: run it on one process, or "
            f"take {' or '.join(able)} with method.rollout: simulate"
        )
    for role in method.frames_of(config.method).roles if issubclass(method, ScoresFrames) else ():
        if role in experts:
            raise UserError(
                f"roles.{role}: the frames of every video are scored at a time of their own, {mixing}: run it on one "
                f"process, or give the frame roles a model of one network"
            )


def _check_needs(config: RunConfig[Any, Any], by_role: Mapping[str, DistillAdapter[Any]]) -> None:
    method = load_method(config.distill_method)
    needs, flow_maps = method.needs_of(config.method), method.flow_maps_of(config.method)
    for role, family in by_role.items():
        lacking = needs - family.supports - (set() if role in flow_maps else {"flow_map"})
        if of_folder(family.folder).boundary(config.roles[role].path) is not None and lacking:
            hint = "; leave method.critic_sees_rung out" if role == "critic" and "flow_map" in lacking else ""
            raise UserError(
                f"{config.distill_method} needs {' and '.join(sorted(lacking))}, which a model of two experts does not "
                f"have ({family.config.path}, role {role}){hint}"
            )
