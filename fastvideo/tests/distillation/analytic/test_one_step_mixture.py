"""One-step students of a mixture with three modes after a small budget: close to it, and no mode lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastvideo.distillation.builder import initialising
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.engine.ema import EMAHook
from fastvideo.distillation.engine.training import RoleTraining
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.mixtures import (
    WEIGHTS,
    exact_batch,
    learned_velocity,
    mode_shares,
    one_step,
    three_modes,
    wasserstein_1,
)
from fastvideo.tests.distillation.toys import train


@dataclass(frozen=True)
class Run:
    """How one method is trained on the mixture."""

    options: Mapping[str, Any]
    rates: Mapping[str, float]
    steps: int
    start: int = 1000
    """Steps in which student and critic have learnt the teacher's velocity."""
    gain: float = 8.0
    side: int = 1
    """Elements of a sample are ``side x side`` draws of the mixture."""
    batch: int = 1024
    pool: int = 20
    """Batches, which return."""
    betas: tuple[float, float] = (0.9, 0.99)


MATCHING = {"generator_update_interval": 3, "score_time_shift": 0.5}
RUNS = {
    "dmd2": Run(MATCHING, {"student": 5e-3, "critic": 1e-2}, 1800, 600, 5.0, 4, 64, 100, (0.0, 0.999)),
    "dmd2_gan": Run(
        {**MATCHING, "gan_weight": 0.03},
        {"student": 5e-3, "critic": 1e-2, "discriminator": 2e-3},
        2400,
        *(600, 5.0, 4, 64, 100, (0.0, 0.999)),
    ),
    "scm": Run(
        {"tangent_warmup_steps": 100, "tangent_constant": 1.0, "log_sigma_mean": 2.0, "log_sigma_std": 1.8},
        {"student": 3e-3, "loss_weight": 1e-3},
        800,
    ),
    "mean_flow": Run(
        {"equal_times": 0.25, "logit_mean": 0.0, "logit_std": 3.0, "loss_power": 0.5, "loss_constant": 0.03},
        {"student": 4e-3},
        1600,
    ),
}


def mixture_method(name: str) -> Any:
    """A method whose one-step student and critic are small networks that have learnt the teacher's velocity."""
    run, cls = RUNS[name], load_method(name)
    adapter = three_modes((1, 1, run.side, run.side))
    config = cls.Config(**{"teacher_guidance": 1.0, **run.options})
    with initialising(1):
        start = learned_velocity(three_modes(), run.start, gain=run.gain)
        own = cls.heads(config, dict.fromkeys((*cls.trainable_roles, *cls.frozen_roles), adapter))
    handles = []
    for role in (*cls.trainable_roles, "teacher"):
        network = own.get(role) or (
            adapter.folder.load_network("denoiser") if role == "teacher" else copy.deepcopy(start)
        )
        handles.append(RoleHandle(role, adapter, network, trainable=role in cls.trainable_roles))
    return cls(config, ModelBundle(handles), Ladder((1.0,)), RandomStreams(3))


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_a_one_step_student_keeps_all_three_modes(name: str) -> None:
    """The averaged weights, which are what a run saves: the live ones swing from mode to mode until the rates fall."""
    run, method = RUNS[name], mixture_method(name)
    assert wasserstein_1(one_step(method)) > 0.5, "the student starts as the teacher, which is no one-step sampler"
    pool = [exact_batch(method.student.adapter, run.batch, seed) for seed in range(run.pool)]
    method.student.training = RoleTraining(torch.optim.SGD(method.student.parameters()))
    average = EMAHook([method.student], 0.98)

    def batches(step: int) -> Batch:
        if step:
            average.after_update(step, method.active_roles(step - 1), torch.zeros(()))
        return pool[step % run.pool]

    train(method, batches, run.steps, run.rates, betas=run.betas)
    with method.student.averaged():
        samples = one_step(method)
    assert wasserstein_1(samples) <= 0.05
    assert mode_shares(samples) == pytest.approx(WEIGHTS, abs=0.05)
