"""Runs under the launch files themselves: ``examples/launch/torchrun.sh`` on one node or several, over gloo."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastvideo.tests.launch import Child, config_file, wait_until

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
SLOWED = "FASTVIDEO_TESTS_SLOWED"
"""Environment variable: ``module:Class.method``, the number of the call, its seconds."""
CRITIC = "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method.critic_loss"
READY = "READY"


def slow() -> None:
    """Make one call of a method last longer, as :data:`SLOWED` says; it prints :data:`READY` when it begins."""
    place, call, seconds = os.environ[SLOWED].split()
    module, name = place.split(":")
    owner, method = name.split(".")
    cls, calls = getattr(import_module(module), owner), [0]
    original = getattr(cls, method)

    def waiting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(call):
            print(READY, flush=True)
            deadline = time.monotonic() + float(seconds)
            while (left := deadline - time.monotonic()) > 0:  # signals interrupt no computation either
                time.sleep(left)
        return original(*arguments, **options)

    setattr(cls, method, waiting)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def environment(values: Mapping[str, Any], folder: Path, *, slowed: str = "", **more: object) -> dict[str, str]:
    """Variables of a launch of the config ``values``, whose worker processes slow a call as :data:`SLOWED` says."""
    (folder / "sitecustomize.py").write_text(
        f"import os\nif 'LOCAL_RANK' in os.environ and os.environ.get('{SLOWED}'):\n"
        f"    from fastvideo.tests.launches import slow\n    slow()\n"
    )
    paths = [str(folder), str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(paths),
        "OMP_NUM_THREADS": "1",
        "CONFIG": str(config_file(values)),
        "OUTPUT": str(values["output"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        SLOWED: slowed,
    }
    return variables | {name: str(value) for name, value in more.items()}


def nodes(count: int, variables: Mapping[str, str], flags: Sequence[str] = ()) -> list[Child]:
    """One ``torchrun.sh`` per node; all nodes are this machine."""
    command = ["bash", str(FOLDER / "torchrun.sh"), *flags]
    return [Child(command, {**variables, "NODES": str(count), "NODE_RANK": str(rank)}) for rank in range(count)]


def wait_until_slow(launched: Sequence[Child]) -> None:
    """Return when every node has a process in its slowed call."""
    wait_until(lambda: all(READY in child.text or child.process.poll() is not None for child in launched))
    for child in launched:
        assert READY in child.text, child.text[-3000:]


def result(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights of a finished run, and its metrics without times."""
    weights = load_file(output / "student" / "network.safetensors")
    lines = [json.loads(line) | {"seconds": 0} for line in (output / "metrics.jsonl").read_text().splitlines()]
    return weights, lines


def same(first: Path, second: Path) -> bool:
    """True if two runs ended in the same bits, with the same metrics."""
    (one, lines), (two, others) = result(first), result(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) and lines == others
