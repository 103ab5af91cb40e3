"""The launch files parse, and every flag, file and field in them exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.tests.test_docs import known_flags

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode"),
    *("signal", "output"),
}
"""Options of sbatch that are used here, from its manual."""


def script_of(path: Path) -> str:
    """The shell text of a launch file."""
    if path.suffix != ".yaml":
        return path.read_text()
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    if "run" in content:
        return f"{content['setup']}\n{content['run']}"
    roles = content["spec"]["pytorchReplicaSpecs"]
    return "\n".join(role["template"]["spec"]["containers"][0]["args"][0] for role in roles.values())


FILES = [path for path in sorted(FOLDER.iterdir()) if path.suffix != ".md"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_shell_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n"], input=script_of(path), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"examples/[\w./-]+\.\w+", path.read_text()))
    assert named
    assert {name for name in named if not (FOLDER.parents[1] / name).is_file()} == set()


def torchrun_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {option for action in get_args_parser()._actions for option in action.option_strings}


def test_flags_of_torchrun_and_of_the_run_exist() -> None:
    text = (FOLDER / "torchrun.sh").read_text()
    command = text[text.index("\ntorchrun") :].replace(" &\n", "\n").split("\nlauncher=")[0].replace("\\\n", " ")
    ours, theirs = known_flags("distill"), torchrun_flags()
    launcher, run = command.split(" -m ", 1)
    assert {word for word in shlex.split(launcher) if word.startswith("--")} <= theirs
    assert {word for word in shlex.split(run) if word.startswith("--")} | {"--resume"} <= ours


@pytest.mark.parametrize(
    ("section", "flags", "resumes"),
    [
        ("{every: 2}", [], False),
        ("{mirror: null}", [], False),
        ("\n  every: 2\n  mirror: s3://bucket/run", [], True),
        ("{every: 2}", ["--checkpoint.mirror", "s3://bucket/run"], True),
    ],
)
def test_a_run_with_a_mirror_goes_on_from_it_on_a_new_disk(
    section: str, flags: list[str], resumes: bool, tmp_path: Path
) -> None:
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "run.yaml").write_text(f"checkpoint: {section}\n")
    done = subprocess.run(
        ["bash", str(FOLDER / "torchrun.sh"), *flags],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CONFIG": str(tmp_path / "run.yaml"),
            "OUTPUT": str(tmp_path / "out"),
        },
        text=True,
        capture_output=True,
        check=True,
    )
    assert ("--resume" in done.stdout.split()) is resumes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_that_are_passed_on_exist(path: Path) -> None:
    passed = set(re.findall(r"--(?:parallel|data|trainer|model)\.[a-z-]+", path.read_text()))
    assert passed <= known_flags("distill")


@pytest.mark.parametrize(
    ("text", "flags", "resumes"),
    [
        ("checkpoint:\n  mirror: s3://bucket/run\n", [], True),
        ("checkpoint: {every: 5, mirror: 's3://bucket/run'}\n", [], True),
        ("seed: 1  # mirror: s3://bucket/run\n", [], False),
        ("checkpoint:\n  mirror: null\n", [], False),
        ("seed: 1\n", ["--checkpoint.mirror", "s3://bucket/run"], True),
        ("seed: 1\n", ["--checkpoint.mirror=s3://bucket/run"], True),
        ("seed: 1\n", ["--checkpoint.mirror-wait", "5"], False),
    ],
)
def test_a_new_disk_goes_on_from_the_mirror(tmp_path: Path, text: str, flags: list[str], resumes: bool) -> None:
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    found = {"CONFIG": str(tmp_path / "run.yaml"), "OUTPUT": str(tmp_path / "run")}
    shown = subprocess.run(
        ["bash", str(FOLDER / "torchrun.sh"), *flags],
        env=found | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        check=True,
    )
    assert ("--resume" in shown.stdout.split()) is resumes


def test_slurm_requeues_on_the_exit_code_of_a_stopped_run() -> None:
    from fastvideo.errors import EXIT_PREEMPTED

    text = (FOLDER / "slurm.sbatch").read_text()
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)) == SBATCH
    assert f"$code -eq {EXIT_PREEMPTED}" in text
    assert "scontrol requeue" in text


def test_an_array_preprocesses_in_shares() -> None:
    text = (FOLDER / "preprocess.sbatch").read_text()
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)) <= SBATCH | {"array", "gpus"}
    assert {"--shard", "--model", "--out"} <= known_flags("preprocess")
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "16"}
    shown = subprocess.run(
        ["bash", "-c", text.replace("exec srun", "echo"), "job", "videos"],
        env=variables | {"PATH": os.environ["PATH"]},
        text=True,
        capture_output=True,
        check=True,
    )
    assert shown.stdout.strip() == "fastvideo preprocess videos --shard 3/16"


def test_the_nodes_of_the_kubernetes_job_add_up() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    roles = job["spec"]["pytorchReplicaSpecs"]
    container = roles["Master"]["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert sum(role["replicas"] for role in roles.values()) == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    assert roles["Worker"]["template"] == roles["Master"]["template"]
    mounted = {entry["name"] for entry in container["volumeMounts"]}
    assert mounted == {entry["name"] for entry in roles["Master"]["template"]["spec"]["volumes"]}
