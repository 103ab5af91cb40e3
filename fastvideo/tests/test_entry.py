"""Programs end with their exit code, and a process of a group with no more than what it has left to do."""

from __future__ import annotations

import sys

import pytest

from fastvideo.tests.launch import Child

PROGRAM = """
import atexit, os, sys, time
if "WORLD_SIZE" in os.environ:
    import torch
from concurrent.futures import ThreadPoolExecutor
from fastvideo.entry import end_process

class Late:
    def __init__(self):
        self.abort = os.abort

    def __del__(self):
        self.abort()

late = Late() if "WORLD_SIZE" in os.environ else None
pool = ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.2), print("work of a thread")))
atexit.register(print, "at exit")
sys.stdout.write("buffered, ")
end_process(3)
"""
"""Ends by a signal if the interpreter is taken apart, as the threads of a process group can make it."""


@pytest.mark.parametrize("group", [{}, {"WORLD_SIZE": "2", "RANK": "1"}], ids=["alone", "of a group"])
def test_a_process_ends_with_its_code_and_finishes_what_it_began(group: dict[str, str]) -> None:
    child = Child([sys.executable, "-c", PROGRAM], group)
    assert child.wait() == 3, child.text
    assert child.text == "buffered, work of a thread\nat exit\n"
