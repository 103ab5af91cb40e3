"""How long a user waits: for `fastvideo --help`, and for the first step of the tiny recipe.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = "examples/distillation/tiny_wan_dmd2.yaml"
CALL = [sys.executable, "-m", "fastvideo.cli"]


def help_seconds() -> float:
    """From the command to its end."""
    start = time.perf_counter()
    subprocess.run([*CALL, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def first_step_seconds(folder: Path) -> float:
    """From the command to the first line of metrics."""
    flags = ["--output", str(folder), "--trainer.max-steps", "1", "--trainer.log-every", "1", "--validation.every", "0"]
    start = time.perf_counter()
    process = subprocess.Popen([*CALL, "distill", "--config", CONFIG, *flags], stdout=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise RuntimeError(f"fastvideo distill --config {CONFIG} ended with exit code {process.returncode}")
    return seconds


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        helps = [help_seconds() for _ in range(arguments.rounds)]
        steps = [first_step_seconds(Path(root) / str(i)) for i in range(arguments.rounds)]
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "help_seconds": round(statistics.median(helps), 3),
                "first_step_seconds": round(statistics.median(steps), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
