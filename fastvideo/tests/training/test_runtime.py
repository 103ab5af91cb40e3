"""The façade of the engine: frozen roles, buckets of gradients, the last window, what a run costs."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.bundle import frozen
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.optional import diagnosis
from fastvideo.distillation.engine.parallel import distributed
from fastvideo.distillation.engine.runtime import Runtime, Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import RawBatch, RoleLoss
from fastvideo.errors import RunError, UserError
from fastvideo.tests.distillation.toys import spy, toy_method
from fastvideo.tests.launch import in_world
from fastvideo.training.run import run

SIZES = [(3,), (5, 2), (40,), (1,), (4, 4)]


def config_of(values: dict[str, Any], **trainer: Any) -> Any:
    values = values | {"trainer": {**values["trainer"], **trainer}}
    return validate(run_schema("analytic", "dmd2"), values, "test")


def lines(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(values["output"]) / name).read_text().splitlines()]


def test_frozen_roles_get_no_gradient() -> None:
    """A loss that reaches two trained roles trains the one that is not frozen, by the gradient it would have anyway."""
    adapter = AnalyticAdapter(AnalyticConfig())
    adapter.ensure_negative_conditioning()
    method = toy_method("dmd2", adapter)
    runtime = Runtime(method, TrainerConfig(), Tracker(Path(), enabled=False))
    student, critic = method.bundle["student"], method.bundle["critic"]
    outcomes = []
    for names in ((), ("critic",)):
        value = sum(p.square().sum() for handle in (student, critic) for p in handle.parameters())
        with runtime.step(0, ("student",)):
            next(runtime.micro_batches(iter([RawBatch(("0",))])))
            runtime.backward(RoleLoss("student", value, frozen=names))
        outcomes.append([p.grad for handle in (student, critic) for p in handle.parameters()])
        assert all(p.requires_grad for p in critic.parameters())
        for handle in (student, critic):
            handle.network.zero_grad()
    own = len(student.parameters())
    assert all(torch.equal(one, other) for one, other in zip(*(o[:own] for o in outcomes), strict=True))
    assert all(gradient is not None for gradient in outcomes[0])
    assert all(gradient is None for gradient in outcomes[1][own:])


MISTAKES = [
    (RoleLoss("critic", torch.ones(())), "step 3 of the method: its loss for role 'critic' is of no active role; "),
    (
        RoleLoss("student", torch.ones(2)),
        r"step 3 of the method: its loss for role 'student' has a tensor \[2\] as value",
    ),
    (
        RoleLoss("student", torch.ones(()), {"gap": torch.ones(1, 4)}),
        r"has a tensor \[1, 4\] as metric 'gap'; give a sc",
    ),
    (RoleLoss("student", torch.ones(()), {"gap": 0.5}), "has a float as metric 'gap'"),  # type: ignore[dict-item]
    (RoleLoss("student", torch.ones(())), "its loss for role 'student' has no gradient: nothing in it is trained"),
    (("student", torch.ones(())), "step 3 of the method: it yielded a tuple, expected a RoleLoss"),
]


@pytest.mark.parametrize(("loss", "message"), MISTAKES)
def test_a_loss_that_cannot_be_trained_on_is_named(loss: Any, message: str) -> None:
    """With step, role and metric: the method that yielded it is in no traceback."""
    runtime = Runtime(toy_method("dmd2", spy()), TrainerConfig(), Tracker(Path(), enabled=False))
    with runtime.step(3, ("student",)):
        batches = runtime.micro_batches(iter([RawBatch(("0",))]))
        next(batches)
        with pytest.raises(UserError, match=message):
            runtime.backward(loss)
        with pytest.raises(UserError, match=r"active_roles\(3\) are student, and its losses were for none"):
            next(batches)


def test_a_role_frozen_in_its_loss_alone_is_said_when_its_call_is_recomputed() -> None:
    method = toy_method("dmd2", spy())
    runtime = Runtime(method, TrainerConfig(), Tracker(Path(), enabled=False))
    student, critic = (method.bundle[role].parameters()[0] for role in ("student", "critic"))
    for call, fails in ((nullcontext(), True), (frozen((method.bundle["critic"],)), False)):
        with call:
            value = checkpoint(lambda x: x * critic, student, use_reentrant=False).sum()
        with runtime.step(0, ("student",)):
            next(runtime.micro_batches(iter([RawBatch(("0",))])))
            with pytest.raises(UserError, match="here critic, inside `with frozen") if fails else nullcontext():
                runtime.backward(RoleLoss("student", value, frozen=("critic",)))


def averaged(times: int, rank: int, size: int) -> list[torch.Tensor]:
    distributed.BUCKET = 64  # bytes: buckets of several gradients, and some of one
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SIZES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = [parameter.grad for parameter in parameters]
    distributed.average_gradients(parameters, times)
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, before, strict=True))
    return [gradient for gradient in before if gradient is not None]


@pytest.mark.parametrize("times", [1, 2])
def test_gradient_buckets_average_in_place(times: int, tmp_path: Path) -> None:
    found = in_world(2, partial(averaged, times), tmp_path)
    generators = [torch.Generator().manual_seed(rank) for rank in (0, 1)]
    for shape, *means in zip(SIZES, *found, strict=True):
        one, other = (torch.randn(shape, generator=generator) for generator in generators)
        assert all(torch.equal(mean, (one + other) / 2 * times) for mean in means)


def test_last_window_is_logged(analytic_values: dict[str, Any]) -> None:
    run(config_of(analytic_values, max_steps=4, log_every=10))
    (line,) = lines(analytic_values, "metrics.jsonl")
    assert (line["step"], line["window"]) == (4, "cut short")
    assert "student/loss" in line
    shutil.rmtree(Path(analytic_values["output"]) / "student")
    run(config_of(analytic_values, max_steps=12, log_every=10), resume=True)
    assert [line["step"] for line in lines(analytic_values, "metrics.jsonl")] == [10, 12]


def test_resumed_run_replaces_the_closing_line(analytic_values: dict[str, Any], tmp_path: Path) -> None:
    whole = analytic_values | {"output": str(tmp_path / "whole")}
    run(config_of(whole, max_steps=12, log_every=5))
    saved = analytic_values | {"checkpoint": {"every": 7}}
    run(config_of(saved, max_steps=7, log_every=5))
    run(config_of(saved, max_steps=12, log_every=5), resume=True)
    found = [[line | {"seconds": 0} for line in lines(values, "metrics.jsonl")] for values in (whole, saved)]
    assert found[0] == found[1]
    assert [line["step"] for line in found[0]] == [5, 10, 12]


def test_cost_of_each_window(analytic_values: dict[str, Any]) -> None:
    run(config_of(analytic_values, peak_flops=1e9))
    found = lines(analytic_values, "performance.jsonl")
    assert [line["step"] for line in found] == [3, 6, 9, 12]
    for line in found:
        figures = {name.removeprefix("performance/"): value for name, value in line.items() if name != "step"}
        assert figures["samples_per_second"] * figures["seconds_per_step"] == pytest.approx(4)
        positions = 16  # of the analytic family's 1x1x4x4 latents
        assert figures["tokens_per_second"] == pytest.approx(positions * figures["samples_per_second"])
        assert figures["seconds_left"] == pytest.approx((12 - line["step"]) * figures["seconds_per_step"])
        assert figures["peak_memory_bytes"] > 2**20
    assert "performance/flops_utilisation" in found[-1]
    assert "performance/flops_utilisation" not in found[0], "the steps before the count are not known"


class Remembering(nn.Module):
    """Two layers that keep weak references to what is computed between them, recomputed ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.seen: list[StorageWeakRef] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        self.seen.append(StorageWeakRef(hidden.untyped_storage()))
        return self.second(hidden)


def test_counting_flops_keeps_no_recomputed_activations() -> None:
    """The module hooks of torch's own counter keep each of them alive until the step ends."""
    runtime = Runtime(toy_method("sft", spy()), TrainerConfig(peak_flops=1.0), Tracker(Path(), enabled=False))
    alive = []
    for _ in range(3):
        blocks = [Remembering() for _ in range(4)]
        with runtime.performance.step(("student",)):
            x = torch.ones(8, 64, requires_grad=True)
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
            x.sum().backward()
            alive.append(sum(not seen.expired() for block in blocks for seen in block.seen))
    assert [len(block.seen) for block in blocks] == [2] * 4
    assert alive == [0, 0, 0]


def test_flops_are_those_of_the_matrix_products() -> None:
    method = toy_method("sft", spy())
    runtime = Runtime(method, TrainerConfig(peak_flops=1.0), Tracker(Path(), enabled=False))
    for _ in range(3):
        with runtime.performance.step(("student",)):
            torch.ones(2, 3) @ torch.ones(3, 5)
    assert runtime.performance._counts == {("student",): [2 * 2 * 3 * 5] * 2}


def test_profile_is_written(analytic_values: dict[str, Any]) -> None:
    run(config_of(analytic_values, profile={"start": 2, "steps": 2}))
    trace = json.loads((Path(analytic_values["output"]) / "profile" / "rank-0.json").read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"profile": {"start": 11, "steps": 2}}, "ends with step 13, and `max_steps` is 12"),
        ({"profile": {"start": 0, "steps": 0}}, "greater than or equal to 1"),
        ({"peak_flops": 0}, "greater than 0"),
    ],
)
def test_impossible_options(analytic_values: dict[str, Any], trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(analytic_values, **trainer)


def test_memory_snapshot_needs_cuda(analytic_values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"trainer\.memory_snapshot"):
        run(config_of(analytic_values | {"device": "cpu"}, memory_snapshot=True))


@diagnosis.explaining_memory(None)
def allocate_too_much() -> None:
    torch.empty(2**50)


def test_memory_that_runs_out_says_what_to_change() -> None:
    with pytest.raises(RunError, match=r"out of memory: .*parallel\.shard.*data\.batch_size"):
        allocate_too_much()
    with pytest.raises(RuntimeError, match="another"), diagnosis.explaining_memory(None):
        raise RuntimeError("another")
