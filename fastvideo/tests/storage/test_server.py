"""The server of these tests: one that does not serve is a failure with its words, and no endless wait."""

from __future__ import annotations

import os
import re

import pytest

from fastvideo.tests.storage.server import s3_server

MUTE = "import os, time; print('process', os.getpid(), flush=True); time.sleep(600)"
"""A server that waits for ever before it serves."""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (MUTE, r"no server within 5.0 s, exit code None:\nprocess \d+"),
        ("raise SystemExit('no room')", "code 1:\nno room"),
    ],
)
def test_a_server_that_does_not_serve(program: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as failure, s3_server(program, seconds=5.0):
        pass
    for number in re.findall(r"process (\d+)", str(failure.value)):
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)
