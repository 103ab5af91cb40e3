"""Forked processes of the tests that hang end by themselves, and say where they stood."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

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
