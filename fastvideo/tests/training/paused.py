"""A run that waits at a chosen call until a signal has arrived: ``python -m fastvideo.tests.training.paused``.

Arguments: ``module:Class.method``, the number of the call, then those of ``fastvideo distill``. It prints ``READY``
when it waits, and goes on by itself as soon as the process was asked to stop.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from fastvideo import stopping
from fastvideo.cli import main as fastvideo


def pause(place: str, call: int) -> None:
    """Make the ``call``-th call (counted from 1) of a method wait for a signal."""
    module, name = place.split(":")
    owner, method = name.split(".")
    cls = getattr(import_module(module), owner)
    original, calls = getattr(cls, method), [0]

    def waiting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            print("READY", flush=True)
            for _ in range(3000):
                if stopping.received():
                    break
                time.sleep(0.01)
        return original(*arguments, **options)

    setattr(cls, method, waiting)


def paused(place: str, call: int, *arguments: str) -> int:
    """A run that pauses; its exit code."""
    pause(place, call)
    return fastvideo(["distill", *arguments])


if __name__ == "__main__":
    raise SystemExit(paused(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
