"""What a failed process leaves for torchrun's report, and what it keeps of its collectives."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvideo.distillation.engine.optional.recorder import record_collectives, write_collectives
from fastvideo.errors import RunError, UserError
from fastvideo.stopping import Stopped
from fastvideo.tests.launch import in_world
from fastvideo.training import distillation


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that torchrun reads after a failure of this process."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a training that raises."""

    def main(argv: object, model: object) -> int:
        raise error

    monkeypatch.setattr(distillation, "main", main)
    return distillation.guarded([])


def test_a_run_that_cannot_go_on_names_its_reason_to_torchrun(
    error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail_with(RunError("lost contact with rank 1"), monkeypatch) == 1
    found = json.loads(error_file.read_text())
    assert found["message"] == "RunError: lost contact with rank 1"
    assert abs(found["timestamp"] - time.time()) < 60


def test_a_bug_comes_with_its_traceback(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError("by none"), monkeypatch)
    found = json.loads(error_file.read_text())["message"]
    assert found["message"] == "ZeroDivisionError: by none"
    assert "raise error" in found["extraInfo"]["py_callstack"]


@pytest.mark.parametrize(("error", "code"), [(UserError("roles: none"), 2), (Stopped(15), 75)])
def test_a_mistake_and_a_signal_are_not_reported_again(
    error: Exception, code: int, error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail_with(error, monkeypatch) == code
    assert not error_file.exists()


def test_nccl_writes_into_the_runs_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("TORCH_FR_", "TORCH_NCCL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    record_collectives(tmp_path / "stacks")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "stacks" / "nccl-rank-")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def two_collectives(rank: int, size: int) -> list[str]:
    """Two collectives, and their record as its file gives it back."""
    dist.all_reduce(torch.ones(3))
    dist.broadcast(torch.ones(2), src=0)
    folder = Path(os.environ["HOME"])
    write_collectives(folder, rank)
    entries = pickle.loads((folder / f"gloo-rank-{rank}").read_bytes())["entries"]
    return [entry["profiling_name"] for entry in entries]


def test_collectives_are_written_as_they_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert in_world(2, two_collectives, tmp_path / "world") == [["gloo:all_reduce", "gloo:broadcast"]] * 2
