"""``score_and_train``: one forward of the critic gives what two would give at the same noised sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch, UserError
from fastvideo.tests.distillation.analytic.test_dmd2_analytic import dmd2
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, analytic_batch, moments, spy, train, with_given


class SameDraw(RandomStreams):
    """Streams whose score times and noise are the same for every loss; the rollout draws as ever."""

    def uniform(self, count: int) -> Tensor:
        return torch.linspace(0.1, 0.9, count)

    def normal_like(self, other: Tensor) -> Tensor:
        return torch.randn(other.shape, generator=torch.Generator().manual_seed(4))


def gradients(method: DMD2Method, batch: Batch) -> dict[str, list[Tensor]]:
    """What each loss of a student step leaves at its role's parameters."""
    found = {}
    for loss in method.losses(batch, 0):
        loss.value.backward()
        found[loss.role] = [loss.value.detach()]
        for parameter in method.bundle[loss.role].network.parameters():
            assert parameter.grad is not None
            found[loss.role].append(parameter.grad.clone())
    return found


@pytest.mark.parametrize("given", [False, True])
def test_each_gradient_is_that_of_two_forwards_at_the_same_draws(given: bool) -> None:
    found = []
    for joint in (False, True):
        adapter = spy((1, 3, 4, 4))
        batch = analytic_batch(adapter, 5, captions=("0", "1", "0.5", "-1", "2"))
        options: dict[str, Any] = {"rollout": "data", "teacher_guidance": 2.0, "score_and_train": joint}
        method = dmd2(adapter, -0.3, 0.9, critic=(-0.1, 0.7), **options)
        method.rng = SameDraw(3)
        found.append(gradients(method, with_given(batch) if given else batch))
        assert len(adapter.of(method.critic)) == (1 if joint else 2)
    for role in ("student", "critic"):
        for two, one in zip(found[0][role], found[1][role], strict=True):
            assert float(one.abs().max()) > 1e-4
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("joint", "calls"), [(False, {"g": 5, "n": 1}), (True, {"g": 5, "n": 0})])
def test_a_cycle_calls_the_critic_once_less(joint: bool, calls: dict[str, int], adapter: SpyAdapter) -> None:
    method = dmd2(adapter, rollout="data", teacher_guidance=4.5, score_and_train=joint)
    for step in range(5):
        roles = [loss.role for loss in method.losses(analytic_batch(adapter, 2), step)]
        assert tuple(roles) == method.active_roles(step)
    modes = adapter.grad_modes(method.critic)
    assert {mode: modes.count(mode) for mode in "gn"} == calls
    assert adapter.grad_modes(method.teacher) == "nn"
    assert len(adapter.of(method.student)) == 5


def test_the_critics_graph_reaches_the_critic_alone_after_the_students_backward(adapter: SpyAdapter) -> None:
    method, reached = dmd2(adapter, -0.3, 0.9, score_and_train=True), []
    for loss in method.losses(analytic_batch(adapter, 4), 0):
        loss.value.backward()
        holding = {h.name for h in method.bundle for p in h.network.parameters() if p.grad is not None}
        reached.append((loss.role, holding))
        method.bundle[loss.role].network.zero_grad()
    assert reached == [("student", {"student"}), ("critic", {"critic"})]


def test_steps_of_the_critic_alone_are_as_without_it() -> None:
    values = []
    for joint in (False, True):
        adapter = spy()
        method = dmd2(adapter, -0.3, 0.9, score_and_train=joint)
        values.append([loss.value.detach() for loss in method.losses(analytic_batch(adapter, 4), 1)])
    assert torch.equal(*(torch.stack(found) for found in values))


@pytest.mark.nightly
def test_a_student_with_a_learned_critic_reaches_the_truth() -> None:
    adapter = spy((1, 1, 1, 16))
    method = dmd2(adapter, -0.5, 1.2, generator_update_interval=2, score_and_train=True)
    batch = analytic_batch(adapter, 64, latents=False)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return batch

    train(method, batches, 1500, {"student": 0.01, "critic": 0.02}, final_rate=0.1)
    assert moments(method.student) == pytest.approx((MEAN, STD), abs=0.03)


@pytest.mark.parametrize("name", ["dmd2_gan", "f_distill", "rcm", "anyflow"])
def test_methods_that_are_built_on_dmd2_refuse_it(name: str) -> None:
    values = {"distill_model": "analytic", "distill_method": name, "output": "x", "model": {}, "roles": {}}
    with pytest.raises(UserError, match=r"method\.score_and_train: must be false for this method: .*"):
        validate(run_schema("analytic", name), values | {"method": {"score_and_train": True}}, "test")
