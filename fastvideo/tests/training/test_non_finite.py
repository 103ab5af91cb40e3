"""A step that is not finite: the run stops naming it, or leaves it out as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvideo.data.order import SampleStream
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.checkpoint.state import RoleState
from fastvideo.distillation.engine.non_finite import NonFiniteError
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import RoleTraining
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import RawBatch
from fastvideo.training.data import build_data
from fastvideo.training.run import build_trainer

BAD = ("nan",) * 4
"""Captions whose shift of the mean is not a number: every loss of such a batch is NaN."""


class Poisoned:
    """The data of a run, with captions that make the batches of some steps not finite."""

    def __init__(self, stream: SampleStream, steps: set[int]) -> None:
        self.stream, self.steps, self.count = stream, steps, 0

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        batch = next(self.stream)
        self.count += 1
        return RawBatch(BAD) if self.count - 1 in self.steps else batch


def started(values: dict[str, Any], bad: set[int], **trainer: Any) -> tuple[DistillTrainer, Poisoned]:
    """A trainer of the analytic run, and data in which some steps are bad."""
    values = values | {"trainer": {**values["trainer"], **trainer}}
    values["method"] = values["method"] | {"warmup_steps": 20, "generator_update_interval": 2}
    config = validate(run_schema("analytic", "dmd2"), values, "test")
    Path(config.output).mkdir(exist_ok=True)
    adapter = build_adapter(config)
    method = build_method(config, adapter)
    stream, _ = build_data(config, adapter, Processes())
    tracker = Tracker(Path(config.output))
    return build_trainer(config, adapter, method, tracker, Processes()), Poisoned(stream, bad)


def state_of(trainer: DistillTrainer) -> dict[str, Tensor]:
    """Weights, averages, optimizer and schedule of every role, flat."""
    flat: dict[str, Tensor] = {}
    for handle in trainer.method.bundle:
        state = RoleState(handle).state_dict()
        for part in ("network", "ema"):
            flat |= {f"{handle.name}/{part}/{k}": v.clone() for k, v in state.get(part, {}).items()}
        for number, values in state.get("optimizer", {}).get("state", {}).items():
            flat |= {f"{handle.name}/optimizer/{number}/{k}": v.clone() for k, v in values.items()}
        if handle.training is not None and handle.training.lr_scheduler is not None:
            flat[f"{handle.name}/schedule"] = torch.tensor(handle.training.lr_scheduler.last_epoch)
            flat[f"{handle.name}/rate"] = torch.tensor(handle.training.learning_rate, dtype=torch.float64)
    return flat


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("bad", [{4}, {5}, {4, 5, 6}], ids=["student and critic", "critic alone", "several"])
def test_a_step_that_is_left_out_changes_no_weight_optimizer_schedule_or_average(
    analytic_values: dict[str, Any], bad: set[int]
) -> None:
    trainer, data = started(analytic_values, bad, non_finite="skip")
    for _ in range(min(bad)):
        trainer.train_step(data)
    trainer.settle()
    before = state_of(trainer)
    for _ in bad:
        trainer.train_step(data)
    trainer.settle()
    assert equal(before, state_of(trainer))
    trainer.train_step(data)
    trainer.settle()
    assert not equal(before, state_of(trainer))


def test_a_step_that_is_left_out_late_leaves_the_next_one_the_right_rate(analytic_values: dict[str, Any]) -> None:
    """The host reads the verdict while the next step is under way; the schedule is back in time for it."""
    trainer, data = started(analytic_values, {2}, non_finite="skip")
    for _ in range(4):
        trainer.train_step(data)
    trainer.settle()
    critic = trainer.method.bundle["critic"]
    assert critic.training.lr_scheduler.last_epoch == 3  # type: ignore[union-attr]
    assert critic.training.learning_rate == pytest.approx(0.01 * 4 / 20)


def test_the_random_streams_and_the_data_go_on(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {0}, non_finite="skip")
    rng = trainer.method.rng.state_dict()
    trainer.train_step(data)
    trainer.settle()
    assert not torch.equal(rng["local"], trainer.method.rng.state_dict()["local"])
    assert data.stream.round == 1
    assert trainer.step == 1


def test_raise_names_step_role_and_tensor_and_leaves_the_state(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {3})
    for _ in range(3):
        trainer.train_step(data)
    trainer.settle()
    before = state_of(trainer)
    trainer.train_step(data)
    with pytest.raises(NonFiniteError, match=r"^step 3: the loss of role 'critic' \(and \d more\) is not finite"):
        trainer.settle()
    trainer.method.bundle["critic"].training.undo()
    assert equal(before, state_of(trainer))


def test_a_parameter_whose_gradient_alone_is_not_finite_is_named(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, set())
    parameter = trainer.method.bundle["critic"].network.log_std
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_step(data)
    with pytest.raises(NonFiniteError, match="step 0: the gradient of role 'critic' at log_std"):
        trainer.settle()


def test_more_in_a_row_than_allowed_stop_the_run(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {1, 2, 4, 5, 6}, non_finite="skip", max_skips=2)
    with pytest.raises(NonFiniteError, match=r"step 6: .* nor were the 2 before it \(trainer\.max_skips: 2\)"):
        trainer.run(data)


def test_the_count_is_a_metric_and_the_metrics_stay_finite(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {1, 7}, non_finite="skip")
    trainer.run(data)
    lines = [json.loads(line) for line in (trainer.runtime.tracker.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1.0, 1.0, 2.0, 2.0]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in lines)


def test_one_snapshot_per_run_holds_batch_losses_and_random_streams(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {2, 4}, non_finite="skip")
    for _ in range(2):
        trainer.train_step(data)
    rng = trainer.method.rng.state_dict()
    trainer.run(data)
    folder = trainer.runtime.tracker.folder / "non_finite"
    assert sorted(file.name for file in folder.iterdir()) == ["step-2-rank-0.json", "step-2-rank-0.safetensors"]
    content = json.loads((folder / "step-2-rank-0.json").read_text())
    assert content["captions"] == [list(BAD)]
    assert content["losses"] == [["student", "nan"], ["critic", "nan"]]
    assert content["not_finite"][0] == "the loss of role 'student'"
    saved = load_file(folder / "step-2-rank-0.safetensors")
    assert torch.equal(saved["rng/local"], rng["local"])


def test_no_step_waits_for_the_device(analytic_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device each of these would stop the host until the device has caught up."""
    trainer, data = started(analytic_values, {3}, non_finite="skip", log_every=100)
    trainer.train_step(data)
    ready = iter([next(data) for _ in range(2)])  # the order of samples is the host's own, on the CPU

    def refuse(*_: object) -> None:
        raise AssertionError("a step read a tensor")

    for name in ("item", "__float__", "__bool__", "__int__", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    monkeypatch.setattr(trainer.method.rng, "shared_index", lambda high: 0)  # so is this stream
    trainer.train_step(ready)
    trainer.train_step(ready)


def test_an_optimizer_that_cannot_leave_out_a_step_is_not_called(analytic_values: dict[str, Any]) -> None:
    trainer, data = started(analytic_values, {1}, non_finite="skip")
    handle = trainer.method.bundle["critic"]
    averages = handle.training.ema  # type: ignore[union-attr]
    handle.training = RoleTraining(torch.optim.SGD(handle.parameters(), lr=0.01, momentum=0.9), ema=averages)
    trainer.train_step(data)
    before = state_of(trainer)
    trainer.train_step(data)
    trainer.settle()
    assert equal(before, state_of(trainer))


def test_parameters_in_host_memory_get_the_verdict_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would copy it from the device without waiting, and the kernel on the host would read it at once."""
    optimizer, seen = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True), list[str]()
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(optimizer.found_inf.device.type))  # type: ignore[attr-defined]
    with FakeTensorMode():
        RoleTraining(optimizer).step(torch.zeros((), device="cuda"))
    assert seen == ["cpu"]
