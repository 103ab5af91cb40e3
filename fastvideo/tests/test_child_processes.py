"""Forked processes of the tests that hang end by themselves, and say where they stood."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from fastvideo.tests import launch
from fastvideo.tests.launch import Child, in_child, in_world


def wait_for_ever(*_: object) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)


def test_a_rank_that_hangs_is_a_failure_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 ended without a word, code -14(.|\n)*in wait_for_ever"):
        in_world(1, wait_for_ever, tmp_path / "world")


def test_a_fork_that_hangs_is_a_failure_with_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    assert os.WTERMSIG(in_child(wait_for_ever)) == signal.SIGALRM
    assert "in wait_for_ever" in capfd.readouterr().err


def test_a_command_that_is_a_fork_writes_its_stack_to_its_log() -> None:
    child = Child(wait_for_ever)
    assert child.wait(60) == -signal.SIGALRM
    assert "in wait_for_ever" in child.text


def leave_a_cycle() -> None:
    """Leave a frame that PyAV rescaled, by threads of its own, to the collector of cycles."""
    frame = av.VideoFrame.from_ndarray(np.zeros((256, 256, 3), np.uint8), format="rgb24")
    cycle: list[object] = [frame, frame.reformat(64, 64, "yuv420p")]
    cycle.append(cycle)


def test_a_fork_does_not_free_what_threads_of_its_parent_belong_to() -> None:
    gc.disable()
    try:
        leave_a_cycle()
        assert in_child(gc.collect) == 0
    finally:
        gc.enable()
