"""The method under examination, on roles at toy size whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.conformance.subject import Violation, require
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import initialising
from fastvideo.distillation.bundle import ModelBundle, RoleHandle, frozen
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.trajectories import TrajectoryOptions
from fastvideo.distillation.engine.non_finite import StepRecord
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.trajectory import STATE_TIMES, STATES
from fastvideo.distillation.types import Batch, RawBatch, RoleLoss, UserError

LADDER, STEPS = Ladder((1.0, 0.9, 0.75, 0.5)), range(4)
LATER = (10, 30, 100, 300, 1000, 3000)
"""Steps that are far on, where warm-ups have ended."""
SHAPE = (1, 6, 4, 4)
"""Of one sample: as many frames as two chunks of the usual length."""
MEAN, STD = 0.7, 0.4
"""The truth that analytic teachers know: every element is drawn from N(MEAN, STD^2)."""


@dataclass(frozen=True)
class MethodSubject:
    """One method under examination.

    Attributes:
        examined: its class.
        options: of its config, such as short intervals: the checks take four steps.
        student: kind of the student's network (``AnalyticConfig.path``); that of its sampler if not given.
        optional: its optional roles that are there.
    """

    examined: type[DistillMethod[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    student: str = ""
    optional: tuple[str, ...] = ()

    @property
    def config(self) -> MethodConfig:
        """Its config; UserError for a wrong option, or a class that has none."""
        kind = getattr(self.examined, "Config", None)
        if not (isinstance(kind, type) and issubclass(kind, MethodConfig)):
            raise UserError(f"{self.examined.__name__}: its Config is expected to be a subclass of MethodConfig")
        return validate(self.examined.Config, dict(self.options), "of the method")

    def made(
        self, adapter: AnalyticAdapter, mean: float = -0.5, std: float = 1.2, rng: RandomStreams | None = None
    ) -> DistillMethod[Any]:
        """The method on roles of the truth, but for trained ones, which start at N(mean, std^2).

        Trainable roles that no step trains are there to be copied to, so they have networks like the student's.
        """
        method = self._made(adapter, (mean, std), rng, ())
        idle = untrained(method)
        return self._made(adapter, (mean, std), rng, idle) if idle else method

    def _made(
        self, adapter: AnalyticAdapter, start: tuple[float, float], rng: RandomStreams | None, idle: Sequence[str]
    ) -> DistillMethod[Any]:
        cls, config, handles = self.examined, self.config, []
        roles = (*cls.trainable_roles, *cls.frozen_roles, *self.optional)
        usual = "consistency" if cls.sampler == "renoise" else "denoiser"
        student = self.student or ("mean_velocity" if "flow_map" in cls.needs_of(config) else usual)
        with initialising(1):
            heads = cls.heads(config, dict.fromkeys(roles, adapter))
        for role in roles:
            kind = student if role in ("student", "cm_teacher", *idle) else "denoiser"
            trained = role in cls.trainable_roles
            network = heads.get(role) or gaussian(adapter, kind, *(start if trained else (MEAN, STD)))
            handles.append(RoleHandle(role, adapter, network, trained))
        return cls(config, ModelBundle(handles), LADDER, rng or RandomStreams(3))

    def begun(
        self, captions: Sequence[str] = ("",) * 4, *, seed: int = 3, latents: bool = True, seen: Seen | None = None
    ) -> tuple[DistillMethod[Any], Batch]:
        """The method before its first step, and a batch of the truth; with a walk if it trains on such."""
        config, adapter = self.config, AnalyticAdapter(AnalyticConfig(means=(MEAN,), stds=(STD,), shape=SHAPE))
        adapter.ensure_negative_conditioning()
        if seen is not None:
            seen.watch(adapter)
        times = LADDER.times if self.examined.needs_trajectories else ()
        if times and isinstance(config, TrajectoryOptions):
            end = (0.0,) if config.trajectory_kinds[0] == "causal" else ()
            times = (*config.stored_times(times), *end)
        batch = analytic_batch(adapter, len(captions), captions=captions, latents=latents, times=times)
        return self.made(adapter, rng=RandomStreams(seed)), batch

    def losses(
        self, captions: Sequence[str] = ("",) * 4, *, later: bool = False, **given: Any
    ) -> Iterator[tuple[DistillMethod[Any], int, RoleLoss]]:
        """The losses of a few steps on one batch of the truth, each with its method and step; ``later`` ones too."""
        method, batch = self.begun(captions, **given)
        for step in (*STEPS, *(LATER if later else ())):
            for loss in losses_of(method, batch, step):
                yield method, step, loss

    def moments(self) -> Iterator[tuple[DistillMethod[Any], int, RoleLoss | None]]:
        """The method when it is made, at each loss, and at the end of each step, where there is none."""
        method, batch = self.begun()
        yield method, 0, None
        for step in STEPS:
            yield from ((method, step, loss) for loss in losses_of(method, batch, step))
            yield method, step, None


def untrained(method: DistillMethod[Any]) -> list[str]:
    """Trainable roles that none of the steps trains."""
    active = {role for step in STEPS for role in method.active_roles(step)}
    return [role for role in method.trainable_roles if role not in active]


def losses_of(method: DistillMethod[Any], batch: Batch, step: int) -> Iterator[RoleLoss]:
    """The losses of one step.

    Raises:
        Violation: for what no backward could begin with, in the words of a run.
    """
    found: object = method.losses(batch, step)
    require(isinstance(found, Iterable), f"step {step}: losses returns a {type(found).__name__}; yield every RoleLoss")
    for loss in found:  # type: ignore[attr-defined]
        require(isinstance(loss, RoleLoss), f"step {step}: losses yields a {type(loss).__name__}, not a RoleLoss")
        known = loss.role in method.trainable_roles
        obey_the_trainer(RoleLoss(loss.role, loss.value), step, (loss.role,) if known else method.active_roles(step))
        unknown, roles = sorted(set(loss.frozen) - set(method.bundle.roles)), ", ".join(method.bundle.roles)
        require(not unknown, f"step {step}: RoleLoss.frozen names {', '.join(unknown)}; the roles are {roles}")
        yield loss


def obey_the_trainer(loss: RoleLoss, step: int, active: Sequence[str]) -> None:
    """Violation with the sentence of a run, if that would refuse the loss."""
    try:
        StepRecord(step, tuple(active), {}).add(loss)
    except UserError as error:
        raise Violation(str(error)) from error


class Seen(list[Tensor]):
    """Velocities of a family that a gradient can reach."""

    def watch(self, adapter: AnalyticAdapter) -> None:
        """Collect them from now on."""
        answer = adapter.velocity

        def kept(*inputs: Any, **more: Any) -> Tensor:
            output = answer(*inputs, **more)
            if output.requires_grad:
                output.retain_grad()
                self.append(output)
            return output

        adapter.velocity = kept  # type: ignore[method-assign]


def gaussian(adapter: AnalyticAdapter, kind: str, mean: float = MEAN, std: float = STD) -> nn.Module:
    """A ``denoiser``, ``consistency`` or ``mean_velocity`` network of N(mean, std^2)."""
    config = adapter.config.model_copy(update={"means": (mean,), "stds": (std,)})
    return AnalyticAdapter(config).folder.load_network(kind)


def analytic_batch(
    adapter: AnalyticAdapter,
    count: int,
    *,
    captions: Sequence[str] = (),
    seed: int = 5,
    latents: bool = True,
    times: Sequence[float] = LADDER.times,
) -> Batch:
    """A prepared batch of exact data, N(MEAN + caption, STD^2), with the walks that end there, at ``times``.

    No times: no walks."""
    captions, prepare = tuple(captions) or ("",) * count, BatchPreparer(adapter.codec, [adapter.conditioner])
    if not latents:
        return prepare(RawBatch(captions))
    mean = MEAN + adapter.conditioner.encode_prompts(captions).of("analytic")["shift"].view(-1, 1, 1, 1, 1)
    noise = normal((count, *adapter.codec.latent_shape), seeded(seed))
    walk = [(1 - t) * mean + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise for t in times]
    extras = {STATES: torch.stack(walk, 1), STATE_TIMES: torch.tensor(times).expand(count, -1)} if walk else {}
    return prepare(RawBatch(captions, mean + STD * noise, extras))


def backward(method: DistillMethod[Any], loss: RoleLoss) -> None:
    """Backward of one loss, as a run takes it: roles that it names as frozen get no gradient."""
    with frozen([method.bundle[role] for role in loss.frozen]):
        loss.value.backward()  # type: ignore[no-untyped-call]
