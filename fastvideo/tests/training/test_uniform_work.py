"""Processes with other captions and ragged data stay in step; one that stalls ends the run with all stacks."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

TRAIN = [sys.executable, "-m", "fastvideo.training.distillation"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(values: dict[str, Any], ranks: int, command: list[str], first: list[str] | None = None) -> list[Any]:
    """One process per rank, without torchrun; ``first`` is the command of rank 0 instead."""
    file = Path(values["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [*(first if first and rank == 0 else command), "--config", str(file)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[Any]) -> list[tuple[int, str]]:
    """Exit code and messages of every rank; a hang is a failure."""
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture
def values(analytic_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Captions of different length, and a number of samples that no batch divides."""
    (tmp_path / "prompts.txt").write_text("".join(f"0.{i % 7}{'0' * i}\n" for i in range(23)))
    method = analytic_values["method"] | {"generator_update_interval": 2}
    changes = {"method": method, "device": "cpu", "parallel": {"timeout": 60.0}}
    return analytic_values | changes | {"trainer": {"max_steps": 12, "log_every": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_with_other_captions_and_ragged_data_stay_in_step(values: dict[str, Any], ranks: int) -> None:
    values["data"]["batch_size"] = 2
    for code, error in finish(start(values, ranks, TRAIN)):
        assert code == 0, error[-2000:]
    weights = load_file(Path(values["output"]) / "student" / "network.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert not torch.equal(weights["mean"], torch.tensor(0.7))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), [("sft", {}), ("mean_flow", {"jvp": "central_difference"})])
def test_ranks_that_drop_other_captions_stay_in_step(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    roles = {"student": {"trainable": True}} | ({} if method == "sft" else {"teacher": {"trainable": False}})
    values = {"distill_model": "wan", "distill_method": method, "output": str(tmp_path / "run"), "roles": roles}
    values |= {"model": {"path": "tiny"}, "data": {"path": "tiny", "size": 23, "batch_size": 3}, "device": "cpu"}
    values |= {"method": {"caption_dropout": 0.5, **changes}, "parallel": {"timeout": 60.0}}
    values |= {"trainer": {"max_steps": 8, "log_every": 1, "threads": 1}}
    for code, error in finish(start(values, 2, TRAIN)):
        assert code == 0, error[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["student/loss"] for line in lines if "student/loss" in line}
    assert sorted(losses) == list(range(1, 9))
    assert all(math.isfinite(loss) for loss in losses.values())


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(values: dict[str, Any]) -> None:
    place = "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method.critic_loss"
    paused = [sys.executable, "-m", "fastvideo.tests.training.paused", place, "5"]
    processes = start(values, 2, TRAIN, paused)
    checkpoint = Path(values["output"]) / "checkpoints" / "step-5" / "manifest.json"
    metrics = Path(values["output"]) / "metrics.jsonl"
    while not metrics.is_file() and processes[0].poll() is None:
        time.sleep(0.1)  # the fourth step was logged, the fifth is where rank 0 waits
    processes[0].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [75, 75], results
    assert checkpoint.is_file()


@pytest.mark.slow
def test_a_rank_that_stalls_ends_the_run_with_the_stacks_of_all(values: dict[str, Any]) -> None:
    values["trainer"] |= {"watchdog_seconds": 4.0}
    place = "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method.critic_loss"
    paused = [sys.executable, "-m", "fastvideo.tests.training.paused", place, "5"]
    results = finish(start(values, 2, TRAIN, paused))
    assert [code for code, _ in results] == [70, 70], results
    stacks = [(Path(values["output"]) / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "no process got on for 4 s (trainer.watchdog_seconds)" in stacks[0]
    assert "paused.py" in stacks[0], "the stack shows where rank 0 waits"
    assert "train_step" in stacks[1]
