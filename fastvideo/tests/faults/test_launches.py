"""The launch files under real signals: exit codes arrive, a grace is passed on, resumed runs end in the same bits."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.tests.faults.runs import analytic_run
from fastvideo.tests.launch import Child
from fastvideo.tests.launches import CRITIC, FOLDER, environment, nodes, same, wait_until_slow

pytestmark = pytest.mark.slow
MISTAKE, STOPPED = 2, 75
DECODE = "fastvideo.distillation.adapters.analytic:AnalyticCodec.decode"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return analytic_run(tmp_path) | {"output": str(tmp_path / "run"), "checkpoint": {}}


def stopped(launched: list[Child]) -> list[int]:
    """Exit codes after SIGTERM to the last node alone."""
    wait_until_slow(launched)
    launched[-1].signal(signal.SIGTERM)
    return [child.wait(90) for child in launched]


@pytest.mark.parametrize(("count", "gpus"), [(1, 2), (2, 1)], ids=["one agent", "two agents"])
def test_a_long_step_is_waited_for_and_the_exit_code_arrives(
    values: dict[str, Any], tmp_path: Path, count: int, gpus: int
) -> None:
    variables = environment(values, tmp_path, slowed=f"{CRITIC} 5 4", GPUS=gpus, GRACE=50)
    launched = nodes(count, variables)
    assert stopped(launched) == [STOPPED] * count, "\n".join(child.text[-2000:] for child in launched)
    text = " ".join("\n".join(child.text for child in launched).split())
    assert "stopped by SIGTERM at step 3; saved" in text
    assert "nothing was saved" not in text
    again = environment(values, tmp_path, GPUS=2)
    assert nodes(1, again)[0].wait(90) == 0
    if count > 1:
        return
    whole = values | {"output": str(tmp_path / "whole")}
    assert nodes(1, environment(whole, tmp_path, GPUS=2))[0].wait(90) == 0
    assert same(tmp_path / "run", tmp_path / "whole")


def test_the_grace_is_passed_on_and_said(values: dict[str, Any], tmp_path: Path) -> None:
    """A process that needs longer is killed, with nothing to go on from: so it is the grace that acts."""
    launched = nodes(1, environment(values, tmp_path, slowed=f"{CRITIC} 5 60", GPUS=1, GRACE=2))
    assert stopped(launched) == [1]
    assert "within the 2 s that torchrun leaves" in launched[0].text
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_mistake_in_the_config_arrives_as_one(values: dict[str, Any], tmp_path: Path) -> None:
    launched = nodes(1, environment(values, tmp_path, GPUS=2), ["--trainer.max-steps", "-1"])
    assert launched[0].wait(90) == MISTAKE
    assert launched[0].text.count("trainer.max_steps") == 1


def test_a_signal_ends_a_validation_on_all_processes(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"validation": {"every": 2, "prompts": ["0.0", "0.1", "0.2", "0.3"]}, "health": {"enabled": False}}
    values["model"] |= {"shape": [3, 2, 16, 16]}
    launched = nodes(1, environment(values, tmp_path, slowed=f"{DECODE} 1 3", GPUS=2, GRACE=50))
    assert stopped(launched) == [STOPPED]
    assert "stopped by SIGTERM at step 2; saved" in " ".join(launched[0].text.split())
    assert not list((tmp_path / "run" / "validation").glob("*"))
    assert nodes(1, environment(values, tmp_path, GPUS=2))[0].wait(90) == 0
    assert len(list((tmp_path / "run" / "validation").glob("step-000002-*"))) == 2


SRUN = """#!/usr/bin/env bash
# Starts the command once per node and passes signals on, as Slurm's does; ends with the largest exit code.
while [[ $1 == --* ]]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  while :; do code=0; wait "$pid" || code=$?; kill -0 "$pid" 2>/dev/null || break; done
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


def test_the_slurm_job_queues_again_when_it_was_stopped_and_only_then(values: dict[str, Any], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "requeued"
    scontrol = f'#!/bin/sh\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {log}\n'
    for name, text in {"srun": SRUN, "scontrol": scontrol}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 1, "SLURM_JOB_NODELIST": "a,b"}
    variables = environment(values, tmp_path, slowed=f"{CRITIC} 5 3", **job)
    variables["PATH"] = f"{programs}:{variables['PATH']}"
    command = ["bash", str(FOLDER / "slurm.sbatch"), variables["CONFIG"]]
    assert stopped([Child(command, variables)]) == [STOPPED]
    assert log.read_text() == "requeue 7\n"
    assert Child(command, variables | {"FASTVIDEO_TESTS_SLOWED": ""}).wait(90) == 0
    assert Child([*command, "--trainer.max-steps", "-1"], variables).wait(90) == MISTAKE
    assert log.read_text() == "requeue 7\n"


def test_the_containers_of_the_kubernetes_job_work_as_written(values: dict[str, Any], tmp_path: Path) -> None:
    """Each with the variables that the operator sets: the command, the arguments and the grace of the file."""
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    container = pod["containers"][0]
    written = {entry["name"]: entry["value"] for entry in container["env"]}
    variables = environment(values, tmp_path, slowed=f"{CRITIC} 5 3")
    variables = written | variables | {"NODES": "2", "GPUS": "1"}
    assert int(written["GRACE"]) < pod["terminationGracePeriodSeconds"]
    command = [*container["command"], f"cd {FOLDER.parents[1]}; {container['args'][0]}".split("--")[0]]
    launched = [Child(command, variables | {"RANK": str(rank)}) for rank in range(2)]
    assert stopped(launched) == [STOPPED, STOPPED]
