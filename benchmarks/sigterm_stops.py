"""SIGTERM during a long step under torchrun, on one agent and on two: nothing is lost.

    python benchmarks/sigterm_stops.py                        # 20 stops during a step of 90 s: about an hour
    python benchmarks/sigterm_stops.py --step-seconds 5 --rounds 4

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from fastvideo.distillation.engine.checkpoint.manifest import DamagedError, complete_checkpoints, verified
from fastvideo.errors import EXIT_PREEMPTED
from fastvideo.tests.faults.runs import analytic_run
from fastvideo.tests.launch import Child
from fastvideo.tests.launches import CRITIC, environment, nodes, same, wait_until_slow

SPARE = 60
"""Seconds that a stopped run may take beyond its step."""


def measured(rounds: int = 20, step_seconds: float = 90.0, seed: int = 0) -> dict[str, Any]:
    """Stops at a random moment of a step.

    A round survives if every agent ends with 75, the checkpoint is complete, and what follows ends in the bits of a run
    that nobody stopped.
    """
    with tempfile.TemporaryDirectory(prefix="sigterm-") as folder:
        return _measured(Path(folder), rounds, step_seconds, seed)


def _measured(folder: Path, rounds: int, step_seconds: float, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    values = analytic_run(folder) | {"checkpoint": {}}
    whole = folder / "whole"
    if nodes(1, environment(values | {"output": str(whole)}, folder, GPUS=2))[0].wait():
        raise SystemExit("the undisturbed run failed")
    survived, began = {1: 0, 2: 0}, time.monotonic()
    for i in range(rounds):
        agents, output = 1 + i % 2, folder / f"round-{i}"
        problem = _stop_and_go_on(values | {"output": str(output)}, folder, agents, step_seconds, draw)
        problem = problem or ("" if same(output, whole) else "it ended in other bits")
        survived[agents] += not problem
        print(f"round {i + 1}, {agents} agents: {problem or 'survived'} ({time.monotonic() - began:.0f} s)", flush=True)
        shutil.rmtree(output, ignore_errors=True)
    return {
        "sigterm_step_seconds": step_seconds,
        "sigterm_rounds": rounds,
        "sigterm_survived": sum(survived.values()),
        "sigterm_survived_one_agent": survived[1],
        "sigterm_survived_two_agents": survived[2],
    }


def _stop_and_go_on(values: dict[str, Any], folder: Path, agents: int, seconds: float, draw: random.Random) -> str:
    """What went wrong in a round; empty if nothing did."""
    call, output = draw.randint(2, 40), Path(values["output"])
    slowed = f"{CRITIC} {call} {seconds}"
    launched = nodes(agents, environment(values, folder, slowed=slowed, GPUS=2 // agents, GRACE=int(seconds) + SPARE))
    wait_until_slow(launched)
    time.sleep(draw.uniform(0, seconds / 2))
    for child in draw.sample(launched, draw.randint(1, agents)):
        child.signal(signal.SIGTERM)
    codes = [child.wait(seconds + 2 * SPARE) for child in launched]
    if codes != [EXIT_PREEMPTED] * agents:
        return f"exit codes {codes}: {_end(launched)}"
    complete = complete_checkpoints(output / "checkpoints")
    if not complete:
        return "no complete checkpoint"
    try:
        verified(complete[-1])
    except DamagedError as error:
        return str(error)
    code = (again := nodes(1, environment(values, folder, GPUS=2)))[0].wait()
    return f"the run that went on ended with {code}: {_end(again)}" if code else ""


def _end(launched: list[Child]) -> str:
    return " | ".join(" ".join(child.text.split())[-400:] for child in launched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="stops")
    parser.add_argument("--step-seconds", type=float, default=90.0, help="length of the step that is stopped in")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(measured(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
