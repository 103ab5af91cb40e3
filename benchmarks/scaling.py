"""Samples per second of 2 processes with one core each against 1, on a mid-size network: data parallel and sharded.

Perfect scaling is 1: two processes then take twice the samples in the same time. Cores share caches and memory, so two
runs that know nothing of each other are measured too: what they lose is lost to the machine. Runs take turns.

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

from fastvideo.entry import end_process

SHARDS = ["--parallel.shard", "2"]
LAYOUTS = {
    "one": (1, []),
    "apart": (2, []),
    "copies": (2, []),
    "shards": (2, SHARDS),
    "shards, kept gathered": (2, [*SHARDS, "--parallel.keep-gathered", "all"]),
}
"""Name -> processes, flags; ``apart`` are two runs of one process at the same time."""
STEPS = 22
WARM_UP = 2
BATCH = 4
"""Videos per process."""


def worker(argv: list[str]) -> int:
    """Train with the process on one core; print the mean time of a step: steps differ by role."""
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
    return code


def seconds(file: Path, world: int, flags: list[str]) -> float:
    """Mean time of a step of the slowest process."""
    argv = [__file__, "--worker", "--config", str(file), "--overwrite", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return slowest([start([*(torchrun if world > 1 else []), *argv])], world)


def seconds_apart(file: Path, world: int) -> float:
    """The same of processes that know nothing of each other: what the machine itself allows."""
    argv = [__file__, "--worker", "--config", str(file), "--overwrite", "--output"]
    return slowest([start([*argv, f"{file}-{i}"], core=i) for i in range(world)], world)


def start(arguments: list[str], core: int = 0) -> subprocess.Popen[str]:
    """A Python process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(core)}
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def slowest(processes: list[subprocess.Popen[str]], workers: int) -> float:
    """The longest step that any worker printed, once all have ended.

    Raises:
        RuntimeError: if a process fails.
    """
    ended = [(process, *process.communicate()) for process in processes]
    found = [json.loads(line) for _, out, _ in ended for line in out.splitlines() if line.startswith('{"code"')]
    if len(found) != workers or any(process.returncode for process, _, _ in ended):
        raise RuntimeError("\n".join(f"{process.args}\n{out}\n{error}" for process, out, error in ended))
    return max(float(entry["seconds"]) for entry in found)


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS)[1:], help="these beside one process; all without it")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="videos per process")
    arguments = parser.parse_args()

    from plan_check import config_file

    with tempfile.TemporaryDirectory() as folder:
        file = config_file(Path(folder), "mid")
        values = yaml.safe_load(file.read_text())
        values["trainer"]["max_steps"] = STEPS
        values["data"]["batch_size"] = arguments.batch_size
        file.write_text(yaml.safe_dump(values))
        wanted = [n for n in LAYOUTS if n == "one" or arguments.only is None or n in arguments.only]
        times: dict[str, list[float]] = {name: [] for name in wanted}
        for _ in range(arguments.rounds):
            for name in wanted:
                world, flags = LAYOUTS[name]
                apart = name == "apart"
                times[name].append(seconds_apart(file, world) if apart else seconds(file, world, flags))
                print(f"{name:22} {times[name][-1]:.3f} s per step", flush=True)

    def share(reference: str, names: tuple[str, ...]) -> dict[str, float]:
        pairs = {name: zip(times[reference], times[name], strict=True) for name in names}
        return {name: round(statistics.median(a / b for a, b in both), 3) for name, both in pairs.items()}

    efficiency = share("one", tuple(wanted[1:]))
    of_apart = share("apart", tuple(n for n in wanted[1:] if n != "apart")) if "apart" in wanted else {}
    found = {"batch_size": arguments.batch_size, "efficiency": efficiency, "of_apart": of_apart}
    print(json.dumps({"benchmark": "scaling"} | found))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        end_process(worker([argument for argument in sys.argv[1:] if argument != "--worker"]))
    else:
        main()
