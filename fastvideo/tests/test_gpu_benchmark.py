"""The benchmark of a first GPU run works at toy size on a CPU, so that no GPU is rented to find a typing error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_dry_run_of_the_gpu_benchmark_measures_all_sections(tmp_path: Path) -> None:
    script = [str(ROOT / "benchmarks/gpu.py"), "--dry-run", "--steps", "2", "--work", str(tmp_path / "work")]
    only = ["--only", "environment", "attention", "recipe", "resume"]  # blocks compile for a minute
    done = subprocess.run([sys.executable, *script, *only], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["recipe"]["seconds_per_step"] > 0
    assert found["recipe"]["plan_gib"] > 0
    assert found["resume"] == {"steps": 1, "largest_difference": 0.0, "first_step": found["resume"]["first_step"]}
