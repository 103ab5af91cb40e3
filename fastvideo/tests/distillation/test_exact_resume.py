"""N steps are k steps, a restart and N - k steps: bit for bit, for every method, at every k."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.engine.checkpoint.manifest import complete_checkpoints
from fastvideo.distillation.engine.checkpoint.restore import role_parts, role_weights
from fastvideo.distillation.engine.training import tensors_of
from fastvideo.distillation.registry import METHODS
from fastvideo.tests.distillation.resuming import STEPS, differences, same_bits, toy_run

ALL_STEPS = ("dmd2_gan", "sft")
"""Resumed at every step on every push; the others at a step in the schedule's warm-up and at one after it."""


def resumes() -> Iterator[Any]:
    """Every method, without and with accumulation; all steps of the other methods are for the night."""
    for name in METHODS:
        some = range(1, STEPS) if name in ALL_STEPS else (1, 4)
        yield pytest.param(name, 1, some, id=f"{name}-{'all' if name in ALL_STEPS else 'two'}")
        if name not in ALL_STEPS:
            yield pytest.param(name, 1, range(1, STEPS), id=f"{name}-all", marks=pytest.mark.nightly)
        yield pytest.param(name, 3, (1, 4) if name in ALL_STEPS else (4,), id=f"{name}-accumulated")
        if name not in ALL_STEPS:
            yield pytest.param(name, 3, (1, 4), id=f"{name}-accumulated-two", marks=pytest.mark.nightly)


@pytest.mark.parametrize(("name", "accumulation", "steps"), list(resumes()))
def test_a_run_that_goes_on_from_any_step_ends_where_the_undisturbed_one_does(
    name: str, accumulation: int, steps: Iterable[int], tmp_path: Path
) -> None:
    undisturbed = toy_run(name, tmp_path / "undisturbed", accumulation=accumulation).train()
    saved = toy_run(name, tmp_path / "saved", accumulation=accumulation, every=1, keep=STEPS).train()
    expected = undisturbed.state()
    assert differences(expected, saved.state()) == []
    for step in steps:
        again = toy_run(name, tmp_path / f"from-{step}", accumulation=accumulation)
        again.restore(step, saved.folder).train()
        assert differences(expected, again.state()) == [], f"resumed at step {step}"
        assert again.logged() == undisturbed.logged(after=step)


@pytest.mark.parametrize(
    "name", [name if name in ALL_STEPS else pytest.param(name, marks=pytest.mark.nightly) for name in METHODS]
)
def test_a_save_in_a_thread_holds_the_state_of_its_step(name: str, tmp_path: Path) -> None:
    """Training goes on while the thread writes: what is written must be what was there."""
    first = toy_run(name, tmp_path / "first", every=1, keep=STEPS).train()
    second = toy_run(name, tmp_path / "second", every=1, keep=STEPS, asynchronous=True).train()
    second.trainer.hooks[0].wait()  # type: ignore[attr-defined]
    for step in range(1, STEPS + 1):
        one, other = (toy_run(name, tmp_path / "x").restore(step, run.folder).state() for run in (first, second))
        assert differences(one, other) == []


def test_an_optimizer_that_has_not_stepped_yet_starts_fresh(tmp_path: Path) -> None:
    """Finding out what a fresh optimizer would hold must not give it a step: Adam counts them."""
    before = toy_run("dmd2", tmp_path, every=1)
    before.trainer.hooks[0].save(0)  # type: ignore[attr-defined]
    assert not before.trainer.method.bundle["student"].training.optimizer.state  # type: ignore[union-attr]
    again = toy_run("dmd2", tmp_path / "again").restore(0, tmp_path)
    assert differences(before.train().state(), again.train().state()) == []


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = toy_run("dmd2", tmp_path / "saved", every=STEPS).train()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    again = toy_run("dmd2", tmp_path / "again")
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    again.restore(STEPS, saved.folder)
    role_weights(saved.folder / "checkpoints" / f"step-{STEPS}", "student", "ema")
    suffixes = {file.suffix for file in (saved.folder / "checkpoints" / f"step-{STEPS}").iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    """Through a method's own state: shapes from scalars to empty ones, and every type that training uses."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    tensors = {str(kind): torch.randn((3, 5), generator=generator).to(kind) for kind in kinds}
    tensors |= {
        str(kind): torch.randint(0, 2, (7,), generator=generator).to(kind) for kind in (torch.bool, torch.uint8)
    }
    tensors |= {"scalar": torch.tensor(1.5), "long": torch.tensor([2**62]), "empty": torch.empty(0, 4)}
    tensors |= {"transposed": torch.arange(6.0).view(2, 3).t(), "nan": torch.tensor([float("nan"), -0.0])}
    before, again = (toy_run("sft", tmp_path / name, every=1) for name in ("before", "again"))
    before.trainer.method.state_dict = lambda: {"inner": tensors, "number": 0.1}  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    again.trainer.method.load_state_dict = found.update  # type: ignore[method-assign, assignment]
    before.trainer.hooks[0].save(1)  # type: ignore[attr-defined]
    again.restore(1, before.folder)
    assert found["number"] == 0.1
    for name, tensor in tensors.items():
        assert same_bits(found["inner"][name], tensor), name


def test_the_newest_stay_and_milestones_too(tmp_path: Path) -> None:
    toy_run("sft", tmp_path, every=1, keep=2, keep_every=3).train()
    steps = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert steps == ["step-3", "step-5", "step-6"]


def test_every_averaged_role_has_its_average_and_the_live_weights_come_back(tmp_path: Path) -> None:
    run = toy_run("dmd2", tmp_path, every=STEPS).train()
    checkpoint = tmp_path / "checkpoints" / f"step-{STEPS}"
    for role in ("student", "critic"):
        handle = run.trainer.method.bundle[role]
        live = {name: tensor.clone() for name, tensor in tensors_of(handle).items()}
        stored = role_weights(checkpoint, role, "ema")
        with handle.averaged():
            inside = handle.network.state_dict()
            assert all(torch.equal(inside[name], stored[name]) for name in stored)
            assert not all(torch.equal(inside[name], live[name]) for name in stored)
        assert all(torch.equal(tensor, live[name]) for name, tensor in tensors_of(handle).items())
        assert role_parts(checkpoint, role) == {"network", "ema", "optimizer"}


def test_up_to_its_first_step_an_average_is_the_live_weights(tmp_path: Path) -> None:
    """The average of the toy run starts at step 2: at step 1 it is a copy, afterwards it lags."""
    toy_run("sft", tmp_path, every=1, keep=STEPS).train()
    for step in range(1, STEPS + 1):
        checkpoint = tmp_path / "checkpoints" / f"step-{step}"
        live, average = (role_weights(checkpoint, "student", part) for part in ("network", "ema"))
        assert torch.equal(live["mean"], average["mean"]) == (step < 2)
