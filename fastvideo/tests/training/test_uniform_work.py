"""Processes with other captions and ragged data stay in step; one that stalls ends the run with all stacks."""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvideo.tests.launch import TRAIN, config_file, ranks


def train(values: dict[str, Any]) -> list[str]:
    """The command of one rank."""
    return [*TRAIN, "--config", str(config_file(values))]


def waiting(values: dict[str, Any]) -> list[str]:
    """:func:`train` that waits before its fifth update of the critic until a signal comes."""
    place = "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method.critic_loss"
    return [sys.executable, "-m", "fastvideo.tests.training.paused", place, "5", "--config", str(config_file(values))]


@pytest.fixture
def values(analytic_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Captions of different length, and a number of samples that no batch divides."""
    (tmp_path / "prompts.txt").write_text("".join(f"0.{i % 7}{'0' * i}\n" for i in range(23)))
    method = analytic_values["method"] | {"generator_update_interval": 2}
    changes = {"method": method, "device": "cpu", "parallel": {"timeout": 60.0}}
    return analytic_values | changes | {"trainer": {"max_steps": 12, "log_every": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_with_other_captions_and_ragged_data_stay_in_step(values: dict[str, Any], count: int) -> None:
    values["data"]["batch_size"] = 2
    for child in ranks(count, train(values)):
        assert child.wait() == 0, child.text[-2000:]
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
    for child in ranks(2, train(values)):
        assert child.wait() == 0, child.text[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["student/loss"] for line in lines if "student/loss" in line}
    assert sorted(losses) == list(range(1, 9))
    assert all(math.isfinite(loss) for loss in losses.values())


STREAMS = {
    "self_forcing": {"min_frames": 3, "max_frames": 6, "same_exit": False},
    "streaming_tuning": {"max_frames": 8, "min_new_frames": 1, "switch_frames": [4, 6]},
}
"""Methods whose forwards are drawn, with options that vary lengths, exits and switches."""


@pytest.mark.slow
@pytest.mark.parametrize("method", STREAMS)
def test_ranks_that_share_networks_roll_streams_in_step(tmp_path: Path, method: str) -> None:
    """Sharded forwards hang where one rank makes more of them than another."""
    roles = {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}}
    values = {"distill_model": "wan", "distill_method": method, "output": str(tmp_path / "run"), "roles": roles}
    values |= {"model": {"path": "tiny"}, "data": {"path": "tiny", "size": 23, "batch_size": 2}, "device": "cpu"}
    options = {"reach": {"window": 2, "sink": 1}, "generator_update_interval": 2, "teacher_guidance": 1.5}
    values |= {"method": {**options, **STREAMS[method]}, "parallel": {"timeout": 60.0, "shard": 2}}
    values |= {"trainer": {"max_steps": 6, "log_every": 1, "threads": 1}, "checkpoint": {"every": 6}}
    for child in ranks(2, train(values)):
        assert child.wait() == 0, child.text[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["critic/loss"] for line in lines if "critic/loss" in line]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(values: dict[str, Any]) -> None:
    processes = ranks(2, train(values), waiting(values))
    checkpoint = Path(values["output"]) / "checkpoints" / "step-5" / "manifest.json"
    processes[0].wait_for("READY")
    processes[0].signal(signal.SIGTERM)
    assert [child.wait() for child in processes] == [75, 75], processes[0].text
    assert checkpoint.is_file()


@pytest.mark.slow
def test_a_rank_that_stalls_ends_the_run_with_the_stacks_of_all(values: dict[str, Any]) -> None:
    values["trainer"] |= {"watchdog_seconds": 4.0}
    processes = ranks(2, train(values), waiting(values))
    assert [child.wait() for child in processes] == [70, 70], processes[0].text
    stacks = [(Path(values["output"]) / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "no process got on for 4 s (trainer.watchdog_seconds)" in stacks[0]
    assert "paused.py" in stacks[0], "the stack shows where rank 0 waits"
    assert "train_step" in stacks[1]
    recorded = [pickle.loads((Path(values["output"]) / "stacks" / f"gloo-rank-{rank}").read_bytes()) for rank in (0, 1)]
    called = [recorded[rank]["entries"][-1]["collective_seq_id"] for rank in (0, 1)]
    assert called[0] < called[1], "rank 0 never entered what rank 1 waits in"


BREAKS = """
import sys, time
from pathlib import Path
from fastvideo.distillation.engine.optional.watchdog import Watchdog
with Watchdog(0.2, Path(sys.argv[1])).watching():
    time.sleep(1)
    raise ConnectionError("the others are gone")
"""
"""A process whose watchdog gives up while its main thread loses the connection to a rank that was faster to exit."""


@pytest.mark.slow
def test_a_lost_connection_does_not_exit_before_a_watchdog_that_gave_up(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", BREAKS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 70, ended.stderr
    assert "no process got on for 0.2 s" in (tmp_path / "rank-0.txt").read_text()
    assert "the others are gone" not in ended.stderr
