"""A role's lr schedule has moved exactly as often as its optimizer, whatever the cadence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW, RAdam

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import attach_optimizer, training_of, warmup_cosine
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.registry import METHODS
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import RawBatch
from fastvideo.tests.distillation.toys import LADDER, toy_method, trajectory_extras
from fastvideo.tests.preparing import preparer

WARMUP = 4


def build(name: str, **options: object) -> tuple[DistillMethod, AnalyticAdapter]:
    adapter = AnalyticAdapter(AnalyticConfig())
    adapter.ensure_negative_conditioning()
    method = toy_method(name, adapter, warmup_steps=WARMUP, **options)
    for role in method.trainable_roles:
        attach_optimizer(method.bundle[role], method.optimizers(method.config)[role])
    return method, adapter


def train(method: DistillMethod, adapter: AnalyticAdapter, steps: int, accumulation: int) -> None:
    def batches():
        while True:
            latents = RandomStreams(1).normal((2, *adapter.codec.latent_shape))
            walk = trajectory_extras(latents[:, None].expand(-1, len(LADDER), -1, -1, -1, -1))
            yield RawBatch(("0", "0"), latents, walk)

    options = TrainerConfig(max_steps=steps, grad_accumulation=accumulation, log_every=100)
    runtime = Runtime(method, options, Tracker(Path(), enabled=False))
    DistillTrainer(method, preparer(adapter), options, runtime).run(batches())


def optimizer_steps(handle: RoleHandle) -> int:
    state = handle.training.optimizer.state
    return int(next(iter(state.values()))["step"]) if state else 0


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(steps=st.integers(1, 12), accumulation=st.integers(1, 3))
def test_schedule_position_equals_optimizer_steps(name: str, steps: int, accumulation: int) -> None:
    method, adapter = build(name)
    train(method, adapter, steps, accumulation)
    for role in method.trainable_roles:
        handle = method.bundle[role]
        expected = sum(role in method.active_roles(step) for step in range(steps))
        assert optimizer_steps(handle) == expected
        assert handle.training.lr_scheduler.last_epoch == expected


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_student_is_stepped_on_interval_steps_only_and_critic_on_all(interval: int) -> None:
    method, adapter = build("dmd2", generator_update_interval=interval)
    train(method, adapter, 11, 1)
    assert optimizer_steps(method.bundle["student"]) == len(range(0, 11, interval))
    assert optimizer_steps(method.bundle["critic"]) == 11


def test_learning_rate_follows_the_updates_of_its_own_role() -> None:
    method, adapter = build("dmd2", generator_update_interval=5, student_learning_rate=0.1, critic_learning_rate=0.2)
    train(method, adapter, 6, 1)  # two student updates, six critic updates
    assert method.bundle["student"].training.learning_rate == pytest.approx(0.1 * 3 / WARMUP)
    assert method.bundle["critic"].training.learning_rate == pytest.approx(0.2)


def test_warmup_then_cosine() -> None:
    assert [warmup_cosine(4, 0, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_cosine(0, 10, 0) == 1.0
    assert warmup_cosine(0, 10, 5) == pytest.approx(0.5)
    assert warmup_cosine(0, 10, 10) == warmup_cosine(0, 10, 99) == pytest.approx(0.0)


def test_a_frozen_role_cannot_be_stepped() -> None:
    method, _ = build("dmd2")
    with pytest.raises(RuntimeError, match="teacher"):
        training_of(method.bundle["teacher"]).step()


@pytest.mark.parametrize(("kind", "expected"), [("adamw", AdamW), ("radam", RAdam)])
def test_a_role_gets_the_optimizer_that_its_method_names(kind: str, expected: type) -> None:
    """One step of AdamW goes ``rate`` far; RAdam's first steps are plain momentum, so far as the gradient is large."""
    adapter = AnalyticAdapter(AnalyticConfig())
    handle = RoleHandle("student", adapter, adapter.folder.load_network(), trainable=True)
    attach_optimizer(handle, OptimizerConfig(learning_rate=0.1, kind=kind, weight_decay=0.5))
    assert type(handle.training.optimizer) is expected
    mean = handle.network.mean
    mean.grad = torch.full_like(mean, 1e-3)
    before = float(mean.detach())
    handle.training.step()
    moved = before * (1 - 0.1 * 0.5) - float(mean.detach())  # what decoupled decay leaves, less the step
    assert moved == pytest.approx(0.1 if kind == "adamw" else 0.1 * 1e-3, rel=1e-3)
