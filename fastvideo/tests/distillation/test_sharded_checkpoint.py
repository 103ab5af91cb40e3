"""Checkpoints of sharded roles: exact on the same processes, and exact in weights and optimizers on others."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.engine.checkpoint import manifest
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, Parts, RunFacts
from fastvideo.distillation.engine.checkpoint.initial import start_from
from fastvideo.distillation.engine.checkpoint.manifest import Manifest
from fastvideo.distillation.engine.checkpoint.restore import damage, restore, role_weights
from fastvideo.distillation.engine.checkpoint.state import RoleState, split_state
from fastvideo.distillation.engine.ema import EMAHook
from fastvideo.distillation.engine.lora import AdapterSwitch, add_adapter
from fastvideo.distillation.engine.parallel.collective import Agreement
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import RoleTraining
from fastvideo.distillation.rng import RandomStreams
from fastvideo.files import record_of
from fastvideo.tests.distillation.resuming import differences
from fastvideo.tests.launch import in_world

WIDTHS = (5, 7, 3)
"""Sizes that no number of processes divides."""


class Net(nn.Module):
    """Two linear layers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*WIDTHS[:2]), nn.Linear(*WIDTHS[1:])
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


class Window:
    """Stands for the trainer: one number per process."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]

    def load_foreign_state(self, state: Any, step: int) -> str:
        return "a new window"


class Run:
    """A sharded role with optimizer, schedule and average, on this process among ``size``."""

    def __init__(self, rank: int, size: int, folder: Path, adapter: bool = False) -> None:
        torch.manual_seed(3)
        network: nn.Module = Net()
        self.processes = Processes(rank, size, shard=size)
        if adapter:
            add_adapter(network.requires_grad_(False), "student", LoRAConfig(rank=2, targets=("first",)), seed=0)
        if size > 1:
            fully_shard(network, mesh=init_device_mesh("cpu", (size,)))
        switch = AdapterSwitch(network, "student", None) if adapter else None
        trained = switch.parameters() if switch else None
        self.handle = RoleHandle("student", None, network, True, select=switch, trained=trained)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(self.handle.parameters(), lr=1e-2, betas=(0.5, 0.9), fused=True)
        self.training = RoleTraining(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        self.handle.training = self.training
        self.average = EMAHook([self.handle], 0.5)
        self.rng = RandomStreams(3, rank=rank)
        self.stream = SampleStream(MemorySource([str(i) for i in range(24)]), 3, Shard(2, rank, size))
        own = {"trainer": Window(rank + 0.5), "rng": self.rng, "data": self.stream}
        self.parts = Parts({"student": RoleState(self.handle)}, {}, own)
        facts, options = RunFacts("", "0" * 64, {}), CheckpointConfig(every=1)
        self.hook = CheckpointHook(folder / "checkpoints", self.parts, self.processes, options, lambda: False, facts)

    def step(self, number: int) -> None:
        x = torch.randn((4, WIDTHS[0]), generator=torch.Generator().manual_seed(number))
        self.handle.network(x).square().mean().backward()
        self.training.step()
        self.average.after_update(number, ("student",), torch.tensor(0.0))
        next(self.stream), self.rng.uniform(3)

    def restore(self, folder: Path, step: int) -> tuple[str, ...]:
        return restore(folder / "checkpoints" / f"step-{step}", self.parts, self.processes).notes

    def whole(self) -> dict[str, Any]:
        """Every tensor of the role, gathered, and this process's own streams."""
        tensors, rest = split_state({"role": RoleState(self.handle).state_dict(), "rng": self.rng.state_dict()})
        gathered = {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in tensors.items()}
        return {**gathered, "rest": rest, "captions": next(self.stream).captions}


def trained_and_saved(rank: int, size: int, folder: Path) -> dict[str, Any]:
    run = Run(rank, size, folder)
    for number in (1, 2, 3, 4):
        run.step(number)
        if number == 2:
            run.hook.save(2)
    return run.whole()


def resumed(rank: int, size: int, folder: Path, steps: tuple[int, ...] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    run = Run(rank, size, folder)
    notes = run.restore(folder, 2)
    for number in steps:
        run.step(number)
    return run.whole(), notes


def exchanged(rank: int, size: int, folder: Path, adapter: bool) -> bool:
    """Whether averaged weights are in the network inside the context, forward included, and the live ones after it.

    The network is still whole from its last forward whenever they change places.
    """
    run = Run(rank, size, folder, adapter)
    run.step(1), run.step(2)
    x = torch.ones(1, WIDTHS[0])
    with torch.no_grad():
        live = run.handle.network(x)
        with run.handle.averaged():
            average = run.handle.network(x)
        again = run.handle.network(x)
    return bool(torch.equal(live, again) and not torch.equal(live, average))


def started(rank: int, size: int, folder: Path) -> dict[str, Any]:
    run = Run(rank, size, folder / "unused")
    start_from(run.handle, f"{folder / 'checkpoints' / 'step-2'}:student:live", refuse, run.processes)
    return {k: v for k, v in run.whole().items() if k.startswith("role::network")}


def refuse(path: str) -> nn.Module:
    raise AssertionError("a checkpoint is no model folder")


def world(size: int, work: Callable[..., Any], folder: Path, tmp_path: Path, **options: Any) -> list[Any]:
    name = f"{work.__name__}-{size}-{len(list(tmp_path.iterdir()))}"
    return in_world(size, partial(work, folder=folder, **options), tmp_path / name)


def role_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith("role::")}


def test_sharded_roles_go_on_exactly_and_load_into_any_other_sharding(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    ends = world(2, trained_and_saved, folder, tmp_path)
    again = world(2, resumed, folder, tmp_path, steps=(3, 4))
    for end, (state, notes) in zip(ends, again, strict=True):
        assert differences(end, state) == []
        assert notes == ()
    two, _ = world(2, resumed, folder, tmp_path)[0]
    for size in (1, 3):
        found = world(size, resumed, folder, tmp_path)
        for state, notes in found:
            assert differences(role_of(two), role_of(state)) == [], f"on {size} processes"
            assert notes[0].startswith(f"saved by 2 x cpu, resumed by {size} x cpu: weights, optimizers and averages")
            assert len(notes) == 4
            assert torch.equal(two["rng::shared"], state["rng::shared"])
            assert not torch.equal(two["rng::local"], state["rng::local"])
    whole = role_weights(folder / "checkpoints" / "step-2", "student", "ema")
    assert all(torch.equal(whole[name.split("::")[-1]], two[name]) for name in two if name.startswith("role::ema"))
    for state in world(2, started, folder, tmp_path):
        assert differences({k: v for k, v in two.items() if k.startswith("role::network")}, state) == []


def test_what_one_process_saved_loads_into_shards(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    world(1, trained_and_saved, folder, tmp_path)
    one, _ = world(1, resumed, folder, tmp_path)[0]
    for state, _ in world(2, resumed, folder, tmp_path):
        assert differences(role_of(one), role_of(state)) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_averages_are_exchanged_shard_by_shard(adapter: bool, tmp_path: Path) -> None:
    assert world(2, exchanged, tmp_path / "unused", tmp_path, adapter=adapter) == [True, True]


def save_after_waiting(rank: int, size: int, folder: Path) -> bool:
    """Save where this process comes later than a collective may take, as after a validation."""
    run = Run(rank, size, folder)
    Agreement()  # a run makes its group at the start
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    if rank == 0:
        time.sleep(2)
    return (run.hook.save(1) / "manifest.json").is_file() or rank > 0


def test_a_save_waits_for_a_process_that_validates(tmp_path: Path) -> None:
    assert in_world(2, partial(save_after_waiting, folder=tmp_path / "run"), tmp_path / "world") == [True, True]


def verify(rank: int, size: int, checkpoint: Path, hashed: Path) -> str | None:
    """Damage of a checkpoint as this process sees it; names of files that it hashed go to a file of its own."""
    names = list[str]()
    with patch.object(manifest, "record_of", lambda file: names.append(file.name) or record_of(file)):
        found = damage(checkpoint, Processes(rank, size))
    (hashed / str(rank)).write_text(" ".join(sorted(names)))
    return found


def test_every_process_verifies_a_part_of_a_checkpoint(tmp_path: Path) -> None:
    in_world(2, partial(save_after_waiting, folder=tmp_path / "run"), tmp_path / "saving")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    look = partial(verify, checkpoint=checkpoint, hashed=tmp_path)
    assert in_world(2, look, tmp_path / "intact") == [None, None]
    own = [set((tmp_path / str(rank)).read_text().split()) for rank in range(2)]
    assert own[0] | own[1] == set(Manifest.read(checkpoint).files)
    assert own[1] == {"process-1.json", "process-1.safetensors"}
    assert not own[0] & own[1]
    for name in ("process-1.safetensors", "shared.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    both = "shared.json is damaged; process-1.safetensors is damaged"
    assert in_world(2, look, tmp_path / "damaged") == [both, both]
