"""AdamW's moments in 8 bits: what they hold, that checkpoints of them are exact in every layout, what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.cli import main
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.base import OptimizerConfig
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, Parts, RunFacts
from fastvideo.distillation.engine.checkpoint.restore import restore
from fastvideo.distillation.engine.checkpoint.state import RoleState, split_state
from fastvideo.distillation.engine.optional import eight_bit
from fastvideo.distillation.engine.optional.footprint import optimizer_bytes
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import attach_optimizer, check_states, relative_update, training_of
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.resuming import differences
from fastvideo.tests.launch import in_world

pytest.importorskip("torchao")
OPTIONS = OptimizerConfig(learning_rate=1e-2, betas=(0.5, 0.9), weight_decay=0.1, warmup_steps=3)
ROWS = 65
"""No number of processes divides it."""


def handle_of(states: Any, size: int = 1) -> RoleHandle:
    """A role with one parameter in 8 bits, two below the smallest size, and one whose rows are no whole blocks."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(128, ROWS), nn.Tanh(), nn.Linear(ROWS, 70))
    if size > 1:
        fully_shard(network, mesh=init_device_mesh("cpu", (size,)))
    handle = RoleHandle("student", None, network, trainable=True)  # type: ignore[arg-type]
    attach_optimizer(handle, OPTIONS, states)
    return handle


def step(handle: RoleHandle, number: int) -> None:
    x = torch.randn((4, 128), generator=torch.Generator().manual_seed(number))
    (handle.network(x) - 1).square().mean().backward()
    training_of(handle).step()


def state_of(handle: RoleHandle) -> dict[str, Any]:
    """Everything that a checkpoint holds of the role, gathered."""
    tensors, rest = split_state(RoleState(handle).state_dict())
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in tensors.items()} | {"rest": rest}


def hook_of(handle: RoleHandle, processes: Processes, folder: Path) -> CheckpointHook:
    parts, facts = Parts({"student": RoleState(handle)}, {}, {}), RunFacts("", "0" * 64, {})
    return CheckpointHook(folder, parts, processes, CheckpointConfig(every=1), lambda: False, facts)


def trained_and_saved(rank: int, size: int, folder: Path) -> dict[str, Any]:
    handle = handle_of("8bit", size)
    hook = hook_of(handle, Processes(rank, size, shard=size), folder)
    for number in (1, 2, 3, 4):
        step(handle, number)
        if number == 2:
            hook.save(2)
    return state_of(handle)


def resumed(rank: int, size: int, folder: Path, steps: tuple[int, ...] = ()) -> dict[str, Any]:
    handle, processes = handle_of("8bit", size), Processes(rank, size, shard=size)
    restore(folder / "step-2", Parts({"student": RoleState(handle)}, {}, {}), processes)
    for number in steps:
        step(handle, number)
    return state_of(handle)


def test_large_moments_are_bytes_and_follow_those_of_adamw() -> None:
    exact, coded = handle_of("float32"), handle_of("8bit")
    start = [p.detach().clone() for p in exact.parameters()]
    for number in range(8):
        step(exact, number)
        step(coded, number)
    ends = ([p.detach() for p in handle.parameters()] for handle in (exact, coded))
    for before, one, other in zip(start, *ends, strict=True):
        moved = (one - before).norm()
        assert float((one - other).norm() / moved) < (0.1 if eight_bit.has_codes(one.shape) else 0.05)
    stored = {k.removeprefix("optimizer::state::"): v for k, v in state_of(coded).items() if k.startswith("optimizer")}
    assert stored["0.weight::exp_avg::codes"].dtype == torch.uint8
    assert stored["0.weight::exp_avg::codes"].unique().numel() > 50
    assert stored["0.weight::exp_avg_sq::scale"].shape == (ROWS, 2)
    assert stored["2.weight::exp_avg"].dtype == torch.float32, "rows of 65 are no whole blocks"
    assert relative_update(coded) == pytest.approx(relative_update(exact), rel=0.2)
    assert training_of(coded).learning_rate == training_of(exact).learning_rate


def test_the_planned_bytes_are_those_that_are_held() -> None:
    handle = handle_of("8bit")
    held = 0
    for entry in training_of(handle).optimizer.state.values():
        for value in entry.values():
            coded = [value.codes, value.scale, value.qmap] if type(value) is not Tensor else [value]
            held += sum(tensor.nbytes for tensor in coded)
    assert held == optimizer_bytes(handle.parameters(), 1, "8bit")
    large = torch.empty(1536, 8960, device="meta")
    assert optimizer_bytes([large], 1, "8bit") / large.numel() == pytest.approx(2 + 2 * 4 / 64, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_goes_on_to_the_bit(size: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    ends = in_world(size, partial(trained_and_saved, folder=folder), tmp_path / "first")
    again = in_world(size, partial(resumed, folder=folder, steps=(3, 4)), tmp_path / "again")
    for end, state in zip(ends, again, strict=True):
        assert differences(end, state) == []


def test_a_checkpoint_loads_to_the_bit_into_other_layouts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    in_world(2, partial(trained_and_saved, folder=folder), tmp_path / "first")
    found = {size: in_world(size, partial(resumed, folder=folder), tmp_path / f"on-{size}")[0] for size in (1, 2, 3)}
    assert int(found[2]["optimizer::state::0.weight::exp_avg::codes"].count_nonzero()) > 1000
    assert found[2]["optimizer::state::0.weight::exp_avg::scale"].all()
    for size in (1, 3):
        assert differences(found[2], found[size]) == [], f"on {size} processes"


def test_split_moments_are_those_of_one_process(tmp_path: Path) -> None:
    """Blocks do not cross rows, so the codes are the same but for rounding on the edge between two."""
    one = in_world(1, partial(trained_and_saved, folder=tmp_path / "one"), tmp_path / "a")[0]
    two = in_world(2, partial(trained_and_saved, folder=tmp_path / "two"), tmp_path / "b")[0]
    for name in (n for n in one if n.endswith("codes")):
        assert float((one[name] != two[name]).float().mean()) < 0.01, name
    for name in (n for n in one if n.startswith("network")):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def test_without_torchao_a_run_is_refused_and_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    values = {
        "distill_model": "analytic", "distill_method": "sft", "output": str(tmp_path / "run"), "model": {},
        "roles": {"student": {"trainable": True}}, "method": {}, "trainer": {"optimizer_states": "8bit"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "pip install 'fastvideo-distillation[eightbit]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_optimizer_is_refused() -> None:
    options = OPTIONS.model_copy(update={"kind": "radam"})
    with pytest.raises(UserError, match=r"8bit is for AdamW, the optimizer of student is radam"):
        check_states("8bit", {"student": options})
    check_states("float32", {"student": options})
