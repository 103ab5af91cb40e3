"""Killed runs, refused twins, damaged checkpoints: the bounded form of benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.tests.faults.corruption import KINDS, damages, is_detected
from fastvideo.tests.faults.runs import Killer, analytic_run
from fastvideo.tests.launch import fork
from fastvideo.training.lock import LOCK, check_free, locked
from fastvideo.training.run import run

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in a thread"])
def test_a_run_that_is_killed_at_random_goes_on_to_the_same_end(asynchronous: bool, tmp_path: Path) -> None:
    killer = Killer(analytic_run(tmp_path, asynchronous), tmp_path, random.Random(1))
    assert all(killer.survives_one() for _ in range(3))


def test_every_kind_of_damage_to_every_file_is_detected(tmp_path: Path) -> None:
    values = analytic_run(tmp_path) | {"output": str(tmp_path / "run")}
    run(validate(run_schema("analytic", "dmd2"), values, "test"))
    newest = tmp_path / "run" / "checkpoints" / "step-24"
    tried = list(damages(newest, 70))
    assert {damage.kind for damage in tried} == set(KINDS)
    assert {damage.file.name for damage in tried} == {file.name for file in newest.iterdir()}
    assert [damage for damage in tried if not is_detected(damage)] == []


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    values = analytic_run(tmp_path) | {"output": str(tmp_path / "run")}
    config = validate(run_schema("analytic", "dmd2"), values, "test")
    ready, told = os.pipe()

    def hold() -> None:
        with locked(Path(config.output)):
            os.write(told, b"1")
            signal.pause()

    child = fork(hold)
    os.close(told)
    try:
        assert os.read(ready, 1), "it ended without the lock"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"is in use by another run: process {child} on {os.uname().nodename}"):
                run(config, **options)
        assert [entry.name for entry in Path(config.output).iterdir()] == [LOCK]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
    check_free(Path(config.output))
    run(config)  # the lock of a dead process holds nobody up
    assert not (Path(config.output) / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = analytic_run(tmp_path) | {"output": str(tmp_path / "file" / "run")}
    with pytest.raises(UserError, match=r"output folder .*run cannot be written: Not a directory"):
        run(validate(run_schema("analytic", "dmd2"), values, "test"))


@pytest.mark.nightly
def test_the_benchmark_reports_no_loss() -> None:
    command = [sys.executable, "benchmarks/faults.py", "--kills", "20", "--corruptions", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == found["bit_equal"] == 20
    assert found["save_points_tried"] == found["save_points_loadable"] > 50
    assert found["corruptions_tried"] == found["corruptions_detected"] == 200
