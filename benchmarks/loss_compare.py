"""Proves that a change of the code changes no number: the losses of every method and family, bit for bit.

    python benchmarks/loss_compare.py main                     # the present tree against a revision
    python benchmarks/loss_compare.py main --methods dmd2 sft  # fewer runs
    python benchmarks/loss_compare.py main --variants          # further options too: LoRA, given frames, joint losses
    python benchmarks/loss_compare.py --write                  # write losses.json anew from the present tree

Each run of fastvideo/tests/distillation/golden/recipes.yaml is done at the revision (in a temporary git worktree) and
in the present tree, on this machine with one thread. Every metric of every step and the saved student's weights must be
equal; otherwise the table names the first step that differs, and the exit code is 1. Nothing of the package is used but
its command and the metrics.jsonl that it leaves, so old revisions work too. The 68 runs take two minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "fastvideo" / "tests" / "distillation" / "golden"
RECIPES, LOSSES = GOLDEN / "recipes.yaml", GOLDEN / "losses.json"
STEPS = 20
TRAJECTORIES = 8

Series = list[float | None]
"""One value per step; None where the step did not log it."""
Run = dict[str, Series]

CHILD = """
import json, sys
from pathlib import Path
import fastvideo
from fastvideo.cli import main

root = Path(sys.argv[1])
assert root in Path(fastvideo.__file__).resolve().parents, f"{fastvideo.__file__} is not in {root}"
for arguments in json.loads(sys.argv[2]):
    print(" ".join(arguments), flush=True)
    if code := main(arguments):
        sys.exit(code)
"""


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; the later layer wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def recipes(methods: Sequence[str] = (), steps: int = STEPS, *, variants: bool = False) -> dict[str, dict[str, Any]]:
    """Config values by run name (``METHOD-FAMILY``), in which every path is relative to the folder of the runs.

    Args:
        methods: those alone, or variants; all methods without any.
        steps: length of each run.
        variants: all variants as well.
    """
    table, found = yaml.safe_load(RECIPES.read_text()), {}
    known = {name: {"distill_method": name, **values} for name, values in table["methods"].items()}
    known |= {name: merged(known[values["distill_method"]], values) for name, values in table["variants"].items()}
    for method in methods or (known if variants else table["methods"]):
        for family in known[method].pop("families", table["families"]):
            name = f"{method}-{family}"
            chosen = {"distill_model": family, "output": name, "trainer": {"max_steps": steps}}
            values = merged(table["base"], table["families"][family], known[method], chosen)
            values["data"]["path"] = values["data"]["path"].format(family=family)
            found[name] = values
    return found


def commands(runs: Mapping[str, Mapping[str, Any]], folder: Path) -> list[list[str]]:
    """Write the configs into ``folder``; the arguments of ``fastvideo``, relative to it, that do the runs."""
    done = []
    for name, values in runs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        config = ["--config", f"{name}.yaml"]
        if (data := values["data"]["path"]).startswith("trajectories"):
            made = ["--out", data, "--count", str(TRAJECTORIES), "--batch-size", str(TRAJECTORIES)]
            made += ["--causal"] if "causal" in data else []
            done.append(["precompute-trajectories", *config, *made])
        done.append(["distill", *config])
    return done


def read_run(output: Path) -> Run:
    """Every metric of a run but the clock's."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = sorted({name for line in lines for name in line} - {"step", "seconds"})
    return {name: [line.get(name) for line in lines] for name in names}


def losses_of(run: Run) -> Run:
    """Its losses alone."""
    return {name: series for name, series in run.items() if name.endswith("/loss")}


def weights_hash(output: Path) -> str:
    """SHA-256 of the saved student's tensors, in the order and layout of their file, without its header."""
    content = (output / "student" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def run_at(root: Path, runs: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[dict[str, Run], dict[str, str]]:
    """Metrics and hashes of the weights by run, with the code of the tree ``root``, in one process."""
    folder.mkdir()
    calls = json.dumps(commands(runs, folder))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        child = [sys.executable, "-c", CHILD, str(root), calls]
        code = subprocess.run(child, cwd=folder, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"the runs in {root} ended with exit code {code}:\n{(folder / 'log').read_text()[-3000:]}")
    return {name: read_run(folder / name) for name in runs}, {name: weights_hash(folder / name) for name in runs}


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="loss_compare.") as folder:
        path = Path(folder).resolve() / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(path), revision], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def first_difference(theirs: Run, ours: Run) -> tuple[int, str] | None:
    """The first step (from 1) where two runs differ, and how; None if they are equal in every bit."""
    if set(theirs) != set(ours):
        return 1, f"metrics {', '.join(sorted(set(theirs) ^ set(ours)))} are on one side alone"
    found = []
    for name, series in theirs.items():
        if len(series) != len(ours[name]):
            return min(len(series), len(ours[name])) + 1, f"{len(series)} steps, then {len(ours[name])}"
        differing = (i for i, pair in enumerate(zip(series, ours[name], strict=True)) if repr(pair[0]) != repr(pair[1]))
        if (step := next(differing, None)) is not None:
            found.append((step + 1, f"{name}: {series[step]!r}, now {ours[name][step]!r}"))
    return min(found, default=None)


def compare(revision: str, runs: Mapping[str, Mapping[str, Any]]) -> int:
    """Print one line per run; the number of runs that differ."""
    differing = 0
    with worktree(revision) as tree, tempfile.TemporaryDirectory(prefix="loss_compare.") as folder:
        theirs, their_weights = run_at(tree, runs, Path(folder) / "theirs")
        ours, our_weights = run_at(ROOT, runs, Path(folder) / "ours")
    for name in runs:
        difference = first_difference(theirs[name], ours[name])
        if difference is None and their_weights[name] != our_weights[name]:
            difference = len(next(iter(ours[name].values()))), "the saved student's weights"
        differing += difference is not None
        verdict = f"differs at step {difference[0]}: {difference[1]}" if difference else "equal"
        print(f"{name:<28}{verdict}", flush=True)
    return differing


def write(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the losses of the present tree to ``losses.json``."""
    with tempfile.TemporaryDirectory(prefix="loss_compare.") as folder:
        found, _ = run_at(ROOT, runs, Path(folder) / "ours")
    rows = []
    for name, run in found.items():
        series = [f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in losses_of(run).items()]
        rows.append(f"{json.dumps(name)}: {{\n" + ",\n".join(series) + "\n}")
    LOSSES.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"wrote {LOSSES.relative_to(ROOT)}")


def main() -> int:
    """Compare or write; 1 if any run differs. One JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="git revision to compare the present tree with")
    parser.add_argument("--methods", nargs="+", default=[], help="these alone; default: all")
    parser.add_argument("--variants", action="store_true", help="the methods with further options as well")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help="write losses.json from the present tree instead")
    arguments = parser.parse_args()
    wrong = arguments.methods or arguments.variants or arguments.steps != STEPS
    if arguments.write == bool(arguments.revision) or (arguments.write and wrong):
        parser.error("give a revision, or --write alone")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the worktree is removed
    start, runs = time.monotonic(), recipes(arguments.methods, arguments.steps, variants=arguments.variants)
    differing = 0
    if arguments.write:
        write(runs)
    else:
        differing = compare(arguments.revision, runs)
    seconds = round(time.monotonic() - start)
    print(json.dumps({"benchmark": "loss_compare", "runs": len(runs), "differing": differing, "seconds": seconds}))
    return int(differing > 0)


if __name__ == "__main__":
    raise SystemExit(main())
