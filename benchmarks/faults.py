"""Kill runs at random moments, cut off saves at every call, damage checkpoints; count what survives.

    python benchmarks/faults.py --kills 100
    python benchmarks/faults.py --cost-alone     # what a save costs, and nothing else

The last line is one JSON object. Needs a system that can fork; one core is enough.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.saving import Saving
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.faults.corruption import damages, is_detected
from fastvideo.tests.faults.runs import Killer, analytic_run, wan_run
from fastvideo.tests.faults.saving import (
    OLD,
    before_a_save,
    calls_of_a_save,
    check_newest,
    cut_off,
    faults_at,
    save,
)
from fastvideo.training.data import build_data
from fastvideo.training.resume import checkpoint_folder, run_facts, survivors
from fastvideo.training.run import build_trainer

WAN_SHARE = 20
"""Every this-many-th kill is of a run of the embedded Wan model; the others are of an analytic one."""
INTERVAL, BLOCK, ROUNDS = 50, 5, 8
"""Steps between two saves, steps of one timed block, and pairs of blocks."""


def random_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill runs at random moments and go on."""
    draw = random.Random(seed)
    shares = {"wan": kills // WAN_SHARE, "analytic in a thread": kills // 3}
    shares["analytic"] = kills - sum(shares.values())
    survived = 0
    for name, count in shares.items():
        if not count:
            continue
        own = folder / name.replace(" ", "_")
        own.mkdir(parents=True)
        values = wan_run(own) if name == "wan" else analytic_run(own, asynchronous=name != "analytic")
        killer = Killer(values, own, draw)
        here = sum(killer.survives_one() for _ in range(count))
        print(f"{name}: {here} of {count} kills survived, undisturbed run {killer.duration:.2f} s", flush=True)
        survived += here
    return {"kills": kills, "bit_equal": survived}


def save_points(folder: Path) -> dict[str, int]:
    """Cut off a save at each of its calls."""
    before = before_a_save(folder)
    target, tried, loadable = folder / "copy", 0, 0
    shutil.copytree(before.folder, target)
    calls = calls_of_a_save(before.run, target)
    for number, name in enumerate(calls):
        for fault in faults_at(name):
            shutil.rmtree(target)
            shutil.copytree(before.folder, target)
            assert cut_off(before.run, target, number, fault) == signal.SIGKILL
            tried += 1
            try:
                check_newest(before, target, name)
                loadable += 1
            except AssertionError as error:
                print(error)
    print(f"saves cut off at {tried} points: {loadable} leave a loadable newest checkpoint", flush=True)
    return {"save_points_tried": tried, "save_points_loadable": loadable}


def corruptions(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage the newest of two checkpoints."""
    before = before_a_save(folder)
    shutil.copytree(before.folder / "checkpoints" / f"step-{OLD}", folder / "older")
    save(before.run, before.folder)
    shutil.move(folder / "older", before.folder / "checkpoints" / f"step-{OLD}")
    newest = max((before.folder / "checkpoints").iterdir())
    found = [(damage, is_detected(damage)) for damage in damages(newest, count, seed)]
    for damage in (damage for damage, detected in found if not detected):
        print(f"not detected: {damage}")
    detected = sum(detected for _, detected in found)
    print(f"damaged {count} times: {detected} detected", flush=True)
    return {"corruptions_tried": count, "corruptions_detected": detected}


def overhead(folder: Path) -> dict[str, float]:
    """Time that saving in a thread takes from the training of the tiny Wan run, beside the same steps without."""
    values: dict[str, Any] = wan_run(folder) | {"output": str(folder / "timed")}
    values["trainer"] = values["trainer"] | {"max_steps": 10**6, "log_every": 10**6}
    values["data"] = values["data"] | {"batch_size": 8}
    values["checkpoint"] = {"every": 10**6, "keep": 1, "asynchronous": True}
    config, alone = validate(run_schema("wan", "dmd2"), values, "the run"), Processes()
    adapter = build_adapter(config, alone)
    method = build_method(config, adapter, alone)
    data, _ = build_data(config, adapter, alone)
    trainer = build_trainer(config, adapter, method, Tracker(folder, enabled=False), alone)
    saving = Saving(trainer.runtime)
    parts = saving.parts(*survivors(trainer, data))
    hook = saving.checkpoints(checkpoint_folder(config), parts, config.checkpoint, run_facts(config), trainer.over)

    def block(saved: bool) -> float:
        begin = time.perf_counter()
        if saved:
            trainer.settle()
            hook.save(trainer.step)
        for _ in range(BLOCK):
            trainer.train_step(data)
        trainer.settle()
        hook.wait()
        return time.perf_counter() - begin

    block(False), block(True)
    pairs = [(block(False), block(True)) for _ in range(ROUNDS)]
    step = statistics.median(without for without, _ in pairs) / BLOCK
    lost = statistics.median(with_save - without for without, with_save in pairs)
    share = max(0.0, lost) / (INTERVAL * step)
    print(f"a save every {INTERVAL} steps of {step:.3f} s costs {lost:.3f} s: {share:.2%}", flush=True)
    return {"async_save_overhead": round(share, 5), "save_seconds": round(lost, 3), "step_seconds": round(step, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="random SIGKILLs of a run")
    parser.add_argument("--corruptions", type=int, default=300, help="damages of a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--cost-alone", action="store_true", help="measure only what a save costs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), dict[str, float]()
        if not options.cost_alone:
            results |= random_kills(folder / "kills", options.kills, options.seed)
            results |= save_points(folder / "saves")
            results |= corruptions(folder / "corruptions", options.corruptions, options.seed)
        (folder / "overhead").mkdir()
        results |= overhead(folder / "overhead")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
