"""Time until `fastvideo doctor` has told what will not work on this machine, and if it told the truth about torch.

python benchmarks/doctor_time.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROUNDS = 3


def told(out: str) -> tuple[float, dict[str, str]]:
    """Seconds of one call, and the text of each finding."""
    command = [sys.executable, "-m", "fastvideo.cli", "doctor", "--out", out, "--json"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return seconds, {finding["subject"]: finding["text"] for finding in json.loads(done.stdout)["findings"]}


def measured() -> dict[str, float | bool]:
    """Median seconds, and if the findings name this torch and this machine's GPUs."""
    with tempfile.TemporaryDirectory() as root:
        rounds = [told(root) for _ in range(ROUNDS)]
    found = rounds[-1][1]
    gpu = found["GPU"].startswith("no GPU") != torch.cuda.is_available()
    true = gpu and f"torch {torch.__version__.partition('+')[0]}" in found["packages"]
    return {"doctor_seconds": round(statistics.median(seconds for seconds, _ in rounds), 2), "doctor_true": true}


if __name__ == "__main__":
    print(json.dumps({"benchmark": "doctor_time", **measured()}))
