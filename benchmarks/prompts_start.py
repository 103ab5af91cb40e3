"""Start of a run on a million prompts: CPU seconds on one core to its first step, and memory of a process.

    python benchmarks/prompts_start.py [--count 1000000]

The prompts are random words of the tiny world, 6 to 14 each, so nearly all are distinct and none is cached. The time is
of the process itself, so that other work on the machine does not count; the prompts have not been checked before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from fastvideo.tiny.captions import WORDS

RUN = """
import json, resource, sys, time
from fastvideo.distillation.config.reading import config_of
from fastvideo.training.run import DistillTrainer, run
step = DistillTrainer.train_step
def timed(self, data):
    step(self, data)
    print(json.dumps([time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]), flush=True)
DistillTrainer.train_step = timed
run(config_of(json.loads(sys.argv[1]), "of the benchmark"))
"""


def write_prompts(file: Path, count: int) -> None:
    """Write ``count`` lines of random words."""
    draw = random.Random(0)
    with file.open("w") as lines:
        lines.writelines(" ".join(draw.choices(WORDS, k=draw.randint(6, 14))) + "\n" for _ in range(count))


def config(root: Path) -> dict[str, object]:
    """A step of DMD2 on the tiny world, in a run that may see every prompt."""
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "model": {"path": "tiny"},
        "roles": {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")},
        "method": {},
        "data": {"prompts": str(root / "prompts.txt"), "batch_size": 4, "cache": str(root / "cache")},
        "trainer": {"max_steps": 10**9, "max_cpu_seconds": 0.01, "log_every": 1, "threads": 1},
        "tracking": {"backends": []},
    }


def measured(count: int = 1_000_000) -> dict[str, float]:
    """CPU seconds from the launch to the end of the first step, and GiB of the process at its largest."""
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder) / "prompts.txt", count)
        call = [sys.executable, "-c", RUN, json.dumps(config(Path(folder)))]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        shown = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=one_thread).stdout
    seconds, gib = json.loads(shown.splitlines()[0])
    return {"prompts_startup_seconds": round(seconds, 1), "prompts_rank_gib": round(gib, 2)}


def main() -> None:
    """Measure, and print one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    print(json.dumps({"benchmark": "prompts_start", **measured(parser.parse_args().count)}))


if __name__ == "__main__":
    main()
