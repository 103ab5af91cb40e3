"""Every method on the tiny world: the same teacher, the same compute, the same prompts and noise, one table.

python benchmarks/leaderboard.py --budget 5m

A method takes part if it has a recipe ``examples/distillation/tiny_wan_METHOD.yaml``. Each is trained in a process of
its own, on one thread, until that process has spent the budget of CPU seconds on training steps: other work on the
machine costs wall time and no budget. What a recipe needs done beforehand comes out of that.
Runs that are measured already (RUNS/BUDGET/METHOD) are not run again; a changed recipe is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from leaderboard_page import write_page
from safetensors.torch import load_file, save_file

from fastvideo.distillation.config.causal import reach_of
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.environment import environment
from fastvideo.errors import UserError
from fastvideo.evaluation.evaluate import Evaluation, evaluate_rows
from fastvideo.evaluation.rows import RowSpec
from fastvideo.inference.loading import load_recipe
from fastvideo.tiny.paths import PIPELINE_FOLDER

RECIPES = Path("examples/distillation")
TEACHER_WEIGHTS = PIPELINE_FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"
STEPS = (4, 2, 1)
TEACHER_STEPS = (50, 4, 2, 1)
UNITS = {"s": 1, "m": 60, "h": 3600}
FIGURES = ("digit_accuracy", "colour_accuracy", "direction_accuracy", "frechet", "frechet_pixel", "diversity")
KEPT_VIDEOS = 8
LOOP = {"trainer.threads": 1, "trainer.max-steps": 10_000_000}
VALIDATIONS = 8
"""Points of a curve, about."""
CPU_PER_STEP = 0.35
"""CPU seconds of a DMD2 step here: only to choose how often to validate."""
CPU_PER_TRAJECTORY = 0.22
"""CPU seconds of one stored trajectory of the teacher (24 guided steps): half of a budget is spent on them."""
PRECOMPUTE = (
    "fastvideo.cli precompute-trajectories --config {recipe} --out {prepared} --count {count} --rows-per-file 64"
)
FROM_TRAJECTORIES = ("kd",)
"""Methods that train on stored trajectories of the teacher."""
FIRST_STAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tcm": ("cm", ("student", "cm_teacher")),
    "anyflow": ("anyflow_pretrain", ("student",)),
}
"""Methods that go on from another one's student, and the roles that start from it: half of the budget goes there."""


@dataclass(frozen=True)
class Arguments:
    """Measure every method of the tiny world and write the page of results."""

    budget: str = "5m"
    """CPU time of each training: 20s, 5m, 1h."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD...", help_behavior_hint="")] = ()
    """Which; default: every registered method of whole videos with a tiny recipe."""
    prompts: int = 512
    """Held-out prompts; all rows get the same ones, and the same noise."""
    seed: int = 0
    """Training seed; prompts and evaluation noise do not depend on it."""
    runs: Path = Path("outputs/leaderboard")
    """Where runs and their figures are kept."""
    out: Path = Path("docs/results.md")
    """The page; figures as JSON and pictures go beside it."""
    remark: str = ""
    """A sentence on the circumstances, for the foot of the page."""

    @property
    def seconds(self) -> float:
        """The budget in seconds.

        Raises:
            UserError: if it is not a number with a unit.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", self.budget)
        if not found or not float(found[1]):
            raise UserError(f"--budget {self.budget}: a time such as 20s, 5m or 1h is expected")
        return float(found[1]) * UNITS[found[2]]


def recipe_of(method: str) -> Path:
    """The method's recipe for the tiny world."""
    return RECIPES / f"tiny_wan_{method}.yaml"


def chosen(arguments: Arguments) -> list[str]:
    """The methods to measure.

    Raises:
        UserError: for one that is not registered or has no recipe.
    """
    for method in arguments.methods:
        if method not in METHODS or not recipe_of(method).is_file():
            raise UserError(f"--methods {method}: no such method, or no {recipe_of(method)}")
    whole = [name for name in METHODS if reach_of(load_method(name).Config()) is None]
    return list(arguments.methods) or [method for method in whole if recipe_of(method).is_file()]


def identity(arguments: Arguments, method: str) -> dict[str, Any]:
    """What a training depends on."""
    recipe = hashlib.sha256(recipe_of(method).read_bytes()).hexdigest()
    return {"budget": arguments.seconds, "seed": arguments.seed, "recipe": recipe, "teacher": teacher_identity()}


def teacher_identity() -> str:
    """Changes with the shipped teacher."""
    return hashlib.sha256(TEACHER_WEIGHTS.read_bytes()).hexdigest()


def measured_process(command: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command to its end; its wall and CPU seconds and its peak memory.

    Raises:
        UserError: if it fails; its output is in ``log``.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    begin = time.monotonic()
    with log.open("a") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=out, env=variables)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with exit code {process.returncode}: see {log}")
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    return {
        "wall_seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_mb": round(used.ru_maxrss / unit),
    }


@dataclass(frozen=True)
class Preparation:
    """What was done before a training: what it counts for, what it cost, and the flags that use it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    flags: Mapping[str, Any] = field(default_factory=dict)


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words of a command line."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def prepare(arguments: Arguments, method: str, folder: Path, log: Path) -> Preparation:
    """Store trajectories of the teacher, or train the first stage, for a method that needs it."""
    shutil.rmtree(folder, ignore_errors=True)
    half = arguments.seconds / 2
    if method in FROM_TRAJECTORIES:
        count = max(64, round(half / CPU_PER_TRAJECTORY))
        cost = measured_process(PRECOMPUTE.format(recipe=recipe_of(method), prepared=folder, count=count).split(), log)
        return Preparation(cost["cpu_seconds"], cost["cpu_seconds"], cost["wall_seconds"], {"data.path": folder})
    if method in FIRST_STAGES:
        first, roles = FIRST_STAGES[method]
        flags = {"config": recipe_of(first), "output": folder, "trainer.max-cpu-seconds": half, **LOOP}
        cost = measured_process(["fastvideo.training.distillation", *as_words(flags | {"validation.every": 0})], log)
        starts = {f"roles.{role}.path": folder / "student" for role in roles}
        return Preparation(half, cost["cpu_seconds"], cost["wall_seconds"], starts)
    return Preparation()


def train(arguments: Arguments, method: str, folder: Path) -> dict[str, Any]:
    """Train within the budget, unless that is done already; what it cost."""
    done, key = folder / "training.json", identity(arguments, method)
    if done.is_file() and (kept := json.loads(done.read_text()))["identity"] == key:
        return dict(kept["cost"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").unlink(missing_ok=True)
    log, run = folder / "log.txt", folder / "run"
    log.write_text("")
    ahead = prepare(arguments, method, folder / "prepared", log)
    budget = arguments.seconds - ahead.seconds
    if budget <= 0:
        raise UserError(f"{method}: its preparation alone took {ahead.seconds} CPU seconds of {arguments.budget}")
    every = max(5, round(arguments.seconds / VALIDATIONS / CPU_PER_STEP))
    flags = {
        "config": recipe_of(method),
        "output": run,
        "seed": arguments.seed,
        "trainer.max-cpu-seconds": budget,
        **LOOP,
        "validation.every": every,
        "validation.world-prompts": 64,
        **ahead.flags,
    }
    shutil.rmtree(run, ignore_errors=True)  # a run that was cut off: what it cost is not known
    cost: dict[str, Any] = measured_process(["fastvideo.training.distillation", *as_words(flags)], log)
    cost["wall_seconds"] = round(cost["wall_seconds"] + ahead.wall_seconds, 1)
    cost["cpu_seconds"] = round(cost["cpu_seconds"] + ahead.cpu_seconds, 1)
    cost["train_steps"] = load_recipe(str(run / "student"))["steps"]
    done.write_text(json.dumps({"identity": key, "cost": cost}, indent=2) + "\n")
    return cost


def sub_ladder(times: Sequence[float], steps: int) -> tuple[float, ...]:
    """``steps`` times out of a student's ladder, evenly; uniform times where it has fewer."""
    if steps > len(times):
        return tuple(1 - i / steps for i in range(steps))
    return tuple(times[i * len(times) // steps] for i in range(steps))


def rows_of(student: str) -> dict[str, RowSpec]:
    """A row per number of steps; a model without a ladder is sampled like a teacher."""
    recipe = load_recipe(student)
    if "ladder" not in recipe:
        return {str(steps): RowSpec(student, steps=steps) for steps in STEPS}
    return {str(steps): RowSpec(student, ladder=sub_ladder(recipe["ladder"], steps)) for steps in STEPS}


def evaluate(arguments: Arguments, name: str, rows: Mapping[str, RowSpec], folder: Path, key: Any) -> dict[str, Any]:
    """Figures of each row, measured unless they are there; the first videos go into a file."""
    file = folder / "figures.json"
    key = {"prompts": arguments.prompts, "model": key}
    if file.is_file() and (kept := json.loads(file.read_text()))["identity"] == key:
        return dict(kept["rows"])
    torch.set_num_threads(1)
    found: Evaluation = evaluate_rows(rows, prompts=arguments.prompts, keep_videos=KEPT_VIDEOS)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({row: videos.contiguous() for row, videos in found.videos.items()}, folder / "videos.safetensors")
    figures = {row: found.rows[row].to_dict() for row in rows}
    file.write_text(json.dumps({"identity": key, "rows": figures}, indent=2) + "\n")
    print(
        f"{name}: " + ", ".join(f"{row} steps: Frechet {found.rows[row].frechet.value:.2f}" for row in rows), flush=True
    )
    return figures


def entries(method: str, figures: Mapping[str, Any], cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of ``results.json`` for one method."""
    return [
        {
            "method": method,
            "steps": int(steps),
            **{name: row[name] for name in FIGURES},
            "wall_seconds": cost["wall_seconds"],
            "peak_rss_mb": cost["peak_rss_mb"],
            "network_calls": row["network_calls"],
            "cpu_seconds": cost["cpu_seconds"],
            "train_steps": cost["train_steps"],
            "intervals": {name: row["intervals"][name] for name in FIGURES},
            "frechet_floor": row["frechet_floor"],
        }
        for steps, row in figures.items()
    ]


def is_measured(arguments: Arguments, method: str, folder: Path) -> bool:
    """Whether a method that was not asked for is on the page anyway: its run is there and still the recipe's."""
    done = folder / "training.json"
    return done.is_file() and bool(json.loads(done.read_text())["identity"] == identity(arguments, method))


def main() -> int:
    """Measure, then write."""
    arguments = tyro.cli(Arguments)
    root, results, failed = arguments.runs / arguments.budget, [], {}
    free = {"wall_seconds": 0.0, "peak_rss_mb": 0, "cpu_seconds": 0.0, "train_steps": 0}
    teacher = {str(steps): RowSpec("tiny", steps=steps) for steps in TEACHER_STEPS}
    figures = evaluate(arguments, "teacher", teacher, arguments.runs / "teacher", teacher_identity())
    results += entries("teacher", figures, free)
    folders = {"teacher": arguments.runs / "teacher"}
    wanted = chosen(arguments)
    for method in (name for name in METHODS if recipe_of(name).is_file()):
        folder = root / method
        if method not in wanted and not is_measured(arguments, method, folder):
            continue
        try:
            cost = train(arguments, method, folder)
            rows = rows_of(str(folder / "run" / "student"))
            figures = evaluate(arguments, method, rows, folder, identity(arguments, method))
        except UserError as error:
            print(f"{method}: {error}", file=sys.stderr, flush=True)
            failed[method] = str(error)
            continue
        results += entries(method, figures, cost)
        folders[method] = folder
    videos = {name: load_file(folder / "videos.safetensors") for name, folder in folders.items()}
    write_page(arguments, results, folders, videos, failed, environment())
    print(arguments.out)
    return 1 if failed else 0


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
