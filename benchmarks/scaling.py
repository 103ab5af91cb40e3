"""Samples per second of 2 processes with one core each against 1, on a mid-size network: data parallel and sharded.

Perfect scaling is 1: two processes then take twice the samples in the same time. Runs take turns.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

LAYOUTS = {"one": (1, []), "copies": (2, []), "shards": (2, ["--parallel.shard", "2"])}
"""Name -> processes, flags."""
STEPS = 25
WARM_UP = 5
BATCH = 2
"""Videos per process."""


def worker(argv: list[str]) -> None:
    """Train with the process on one core; print the median time of a step."""
    os.sched_setaffinity(0, {int(os.environ.get("LOCAL_RANK", "0")) % (os.cpu_count() or 1)})

    from fastvideo.distillation.trainer import DistillTrainer
    from fastvideo.training.distillation import guarded

    times: list[float] = []
    plain = DistillTrainer.train_step

    def timed(self: DistillTrainer, *arguments: object) -> object:
        start = time.perf_counter()
        active = plain(self, *arguments)  # type: ignore[arg-type]
        times.append(time.perf_counter() - start)
        return active

    DistillTrainer.train_step = timed  # type: ignore[assignment,method-assign]
    code = guarded(argv)
    print(json.dumps({"code": code, "seconds": statistics.mean(times[WARM_UP:])}), flush=True)


def seconds(file: Path, world: int, flags: list[str]) -> float:
    """Mean time of a step of the slowest process."""
    argv = [__file__, "--worker", "--config", str(file), "--overwrite", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *(torchrun if world > 1 else []), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    if done.returncode or len(found) != world:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return max(float(entry["seconds"]) for entry in found)


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()

    from plan_check import config_file

    with tempfile.TemporaryDirectory() as folder:
        file = config_file(Path(folder), "mid")
        values = yaml.safe_load(file.read_text())
        values["trainer"]["max_steps"] = STEPS
        values["data"]["batch_size"] = BATCH
        file.write_text(yaml.safe_dump(values))
        times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for _ in range(arguments.rounds):
            for name, (world, flags) in LAYOUTS.items():
                times[name].append(seconds(file, world, flags))
                print(f"{name:8} {times[name][-1]:.3f} s per step", flush=True)
    efficiency = {
        name: round(statistics.median(one / many for one, many in zip(times["one"], found, strict=True)), 3)
        for name, found in times.items()
        if name != "one"
    }
    print(json.dumps({"benchmark": "scaling", "efficiency": efficiency}))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker([argument for argument in sys.argv[1:] if argument != "--worker"])
    else:
        main()
