"""One-step students of distribution matching on a mixture with three modes: close to it, and no mode lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastvideo.distillation.builder import load_method
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.engine.ema import EMAHook, averaged
from fastvideo.distillation.rng import RandomStreams, initialising
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.mixtures import (
    exact_batch,
    learned_velocity,
    mode_shares,
    one_step,
    three_modes,
    wasserstein_1,
)
from fastvideo.tests.distillation.toys import train


def mixture_method(name: str, **options: Any) -> Any:
    """A method on the mixture: one-step student and critic are networks that have learnt the teacher's velocity."""
    adapter = three_modes()
    cls = load_method(name)
    config = cls.Config(**{"teacher_guidance": 1.0, "generator_update_interval": 3, "score_time_shift": 0.5, **options})
    start = learned_velocity(adapter, 500)
    with initialising(1):
        own = cls.heads(config, adapter)
    handles = []
    for role in (*cls.trainable_roles, *cls.frozen_roles):
        network = own.get(role) or (adapter.load_network("denoiser") if role == "teacher" else copy.deepcopy(start))
        handles.append(RoleHandle(role, adapter, network, trainable=role in cls.trainable_roles))
    return cls(config, ModelBundle(handles), Ladder((1.0,)), RandomStreams(3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "steps"), [("dmd2", {}, 2400)])
def test_a_one_step_student_keeps_all_three_modes(name: str, options: dict[str, Any], steps: int) -> None:
    """The averaged weights, which are what a run saves: the live ones swing from mode to mode until the rates fall."""
    method = mixture_method(name, **options)
    pool = [exact_batch(method.teacher.adapter, 64, seed) for seed in range(100)]
    average = EMAHook([method.student], 0.98)

    def batches(step: int) -> Batch:
        if step:
            average.after_update(step, method.active_roles(step - 1), torch.zeros(()))
        return pool[step % 100]

    rates = {"student": 1e-2, "critic": 1e-2, "discriminator": 2e-3}
    train(method, batches, steps, {role: rates[role] for role in method.trainable_roles})
    with averaged(method.student) as network:
        samples = one_step(network, 20_000)
    assert wasserstein_1(samples) <= 0.05
    assert min(mode_shares(samples)) > 0.2
