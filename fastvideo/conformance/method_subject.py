"""The method under examination, on roles at toy size whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import initialising
from fastvideo.distillation.bundle import ModelBundle, RoleHandle, frozen
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.trajectories import TrajectoryOptions
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.trajectory import STATE_TIMES, STATES
from fastvideo.distillation.types import Batch, RawBatch, RoleLoss

LADDER, STEPS = Ladder((1.0, 0.9, 0.75, 0.5)), range(4)
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
        """Its config; UserError for a wrong option."""
        return validate(self.examined.Config, dict(self.options), "of the method")

    def made(
        self, adapter: AnalyticAdapter, mean: float = -0.5, std: float = 1.2, rng: RandomStreams | None = None
    ) -> DistillMethod[Any]:
        """The method on roles of the truth, but for trained ones, which start at N(mean, std^2)."""
        cls, config, handles = self.examined, self.config, []
        roles = (*cls.trainable_roles, *cls.frozen_roles, *self.optional)
        usual = "consistency" if cls.sampler == "renoise" else "denoiser"
        student = self.student or ("mean_velocity" if "flow_map" in cls.needs_of(config) else usual)
        with initialising(1):
            heads = cls.heads(config, dict.fromkeys(roles, adapter))
        for role in roles:
            start = (mean, std) if role in cls.trainable_roles else (MEAN, STD)
            kind = student if role in ("student", "cm_teacher") else "denoiser"
            network = heads.get(role) or gaussian(adapter, kind, *start)
            handles.append(RoleHandle(role, adapter, network, trainable=role in cls.trainable_roles))
        return cls(config, ModelBundle(handles), LADDER, rng or RandomStreams(3))

    def losses(
        self, captions: Sequence[str] = ("",) * 4, *, seed: int = 3, latents: bool = True, seen: Seen | None = None
    ) -> Iterator[tuple[DistillMethod[Any], int, RoleLoss]]:
        """The losses of a few steps on one batch of the truth, each with its method and step."""
        config, adapter = self.config, AnalyticAdapter(AnalyticConfig(means=(MEAN,), stds=(STD,)))
        adapter.ensure_negative_conditioning()
        if seen is not None:
            seen.watch(adapter)
        times = config.stored_times(LADDER.times) if isinstance(config, TrajectoryOptions) else LADDER.times
        batch = analytic_batch(adapter, len(captions), captions=captions, latents=latents, times=times)
        method = self.made(adapter, rng=RandomStreams(seed))
        for step in STEPS:
            for loss in method.losses(batch, step):
                yield method, step, loss


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
    """A prepared batch of exact data, N(MEAN + caption, STD^2), with the walks that end there, at ``times``."""
    captions, prepare = tuple(captions) or ("",) * count, BatchPreparer(adapter.codec, [adapter.conditioner])
    if not latents:
        return prepare(RawBatch(captions))
    mean = MEAN + adapter.conditioner.encode_prompts(captions).of("analytic")["shift"].view(-1, 1, 1, 1, 1)
    noise = normal((count, *adapter.codec.latent_shape), seeded(seed))
    walk = [(1 - t) * mean + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise for t in times]
    extras = {STATES: torch.stack(walk, 1), STATE_TIMES: torch.tensor(times).expand(count, -1)}
    return prepare(RawBatch(captions, mean + STD * noise, extras))


def backward(method: DistillMethod[Any], loss: RoleLoss) -> None:
    """Backward of one loss, as a run takes it: roles that it names as frozen get no gradient."""
    with frozen([method.bundle[role] for role in loss.frozen]):
        loss.value.backward()  # type: ignore[no-untyped-call]
