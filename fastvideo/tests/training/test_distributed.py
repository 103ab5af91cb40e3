"""Two gloo processes train what one process would, given the same draws."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import fastvideo.training.distillation as entry
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.parallel.context import context_mesh
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import shard_mesh
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.launch import config_file, in_world, ranks, torchrun
from fastvideo.tests.preparing import preparer
from fastvideo.training.data import build_data

STEPS = 7


def emulate(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Both ranks in this process: each draws and computes on its own, the gradients are averaged by hand."""
    config = validate(run_schema("analytic", "dmd2"), values, "test")
    adapter = build_adapter(config)
    ranks = [Processes(rank, 2) for rank in (0, 1)]
    methods = [build_method(config, adapter, rank) for rank in ranks]
    streams = [build_data(config, adapter, rank)[0] for rank in ranks]
    for step in range(STEPS):
        for method, stream in zip(methods, streams, strict=True):
            for loss in method.losses(preparer(adapter)(next(stream)), step):
                loss.value.backward()
        for role in methods[0].active_roles(step):
            average_and_step([method.bundle[role] for method in methods])
    return methods[0].bundle["student"].network.state_dict()


def average_and_step(handles: list[Any]) -> None:
    for parameters in zip(*(handle.parameters() for handle in handles), strict=True):
        mean = torch.stack([p.grad for p in parameters]).mean(0)
        for parameter in parameters:
            parameter.grad = mean.clone()
    for handle in handles:
        clip_grad_norm_(handle.parameters(), 1.0)
        handle.training.step()


@pytest.fixture
def values(analytic_values: dict[str, Any]) -> dict[str, Any]:
    changes = {"trainer": {"max_steps": STEPS, "log_every": 2}, "ema": {"enabled": False}, "device": "cpu"}
    return analytic_values | changes | {"checkpoint": {"every": STEPS}}


def launch(values: dict[str, Any], *flags: str) -> None:
    """Two processes under torchrun, which is to be the same as without it."""
    arguments = ("--distill-model", "analytic", "--distill-method", "dmd2", "--config", str(config_file(values)))
    child = torchrun(2, entry.__file__, *arguments, *flags)
    assert child.wait() == 0, child.text[-2000:]


def launch_forked(values: dict[str, Any], *flags: str) -> None:
    """Two processes with the variables that torchrun would set, and nothing imported again."""
    for child in ranks(2, partial(entry.guarded, ["--config", str(config_file(values)), *flags])):
        assert child.wait() == 0, child.text[-2000:]


@pytest.mark.parametrize(
    "launch", [launch_forked, pytest.param(launch, marks=pytest.mark.slow)], ids=["forked", "torchrun"]
)
def test_torchrun_and_its_resume_equal_the_same_two_ranks_in_one_process(launch: Any, values: dict[str, Any]) -> None:
    launch(values, "--trainer.max-steps", "4")
    launch(values, "--resume")
    output = Path(values["output"])
    trained, expected = load_file(output / "student" / "network.safetensors"), emulate(values)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)
    saved = sorted(file.name for file in (output / "checkpoints" / f"step-{STEPS}").iterdir())
    own = [f"process-{rank}.{end}" for rank in (0, 1) for end in ("json", "safetensors")]
    assert saved == ["config.yaml", "manifest.json", *own, "shared.json", "tensors.json"]


def test_the_ranks_draw_different_tensors_and_take_the_same_decisions(values: dict[str, Any]) -> None:
    config = validate(run_schema("analytic", "dmd2"), values, "test")
    first, second = (build_method(config, build_adapter(config), Processes(rank, 2)).rng for rank in (0, 1))
    assert not torch.equal(first.normal((4,)), second.normal((4,)))
    assert [first.shared_index(4) for _ in range(20)] == [second.shared_index(4) for _ in range(20)]


def waits(rank: int, size: int) -> set[float]:
    """Timeouts of all groups, in seconds, once networks are split and diffusers has made its meshes."""
    processes = Processes(rank, size, torch.device("cpu"), shard=2, context=2, timeout=7.0)
    mesh = context_mesh(processes)
    shard_mesh(processes)
    diffusers = ContextParallelConfig(ulysses_degree=2, mesh=mesh)
    diffusers.setup(rank, size, torch.device("cpu"), mesh)
    groups = dist.distributed_c10d._world.pg_map
    assert diffusers._flattened_mesh.get_group() in groups
    own = [group for group in groups if group is not dist.group.WORLD]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in own}


def test_every_group_waits_as_long_as_the_config_says(tmp_path: Path) -> None:
    assert in_world(4, waits, tmp_path) == [{7.0}] * 4


def crash(rank: int, size: int) -> None:
    if rank:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_rank_that_crashes_says_where(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 ended .* code -11\n.*Segmentation fault.* in crash\n"):
        in_world(2, crash, tmp_path)
