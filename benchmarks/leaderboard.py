"""Every method on the tiny world: the same teacher, the same compute, the same prompts and noise, one table.

python benchmarks/leaderboard.py --budget 5m --seeds 0 1 2

A method takes part if it has a recipe ``examples/distillation/tiny_wan_METHOD.yaml``. Each is trained in a process of
its own, on one thread, until that process has spent the budget of CPU seconds on training steps: other work on the
machine costs wall time and no budget. What a recipe needs done beforehand comes out of that.
Runs that are measured already (RUNS/BUDGET/METHOD-SEED) are not run again; a changed recipe is. So calls with other
``--methods`` can share the work, and a last one writes the page.
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
NO_STUDENT = ("sft",)
"""Methods that train no model of few steps: measured only if they are asked for."""
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
    """Which; default: every registered method of whole videos with a tiny recipe, but ``sft``."""
    prompts: int = 512
    """Held-out prompts; all rows get the same ones, and the same noise."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; prompts and evaluation noise do not depend on them. The first one's run has curves and videos."""
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
        UserError: for one that is not registered or has no recipe, or whose student streams.
    """
    for method in arguments.methods:
        if method not in METHODS or not recipe_of(method).is_file():
            raise UserError(f"--methods {method}: no such method, or no {recipe_of(method)}")
        if reach_of(load_method(method).Config()) is not None:
            raise UserError(
                f"--methods {method}: its student streams; `python -m fastvideo.demo_stream` measures those"
            )
    whole = [name for name in METHODS if reach_of(load_method(name).Config()) is None]
    distilling = [name for name in whole if name not in NO_STUDENT]
    return list(arguments.methods) or [name for name in distilling if recipe_of(name).is_file()]


@dataclass(frozen=True)
class Run:
    """One training: a method, a seed, its budget in CPU seconds, and where it goes."""

    method: str
    seed: int
    seconds: float
    folder: Path
    curve: bool = False
    """Validate while training; costs no budget."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the student depends on."""
        recipe = hashlib.sha256(recipe_of(self.method).read_bytes()).hexdigest()
        return {"budget": self.seconds, "seed": self.seed, "recipe": recipe, "teacher": teacher_identity()}

    @property
    def cost(self) -> dict[str, Any] | None:
        """Cost of the training if it is over and its recipe is still the same."""
        done = self.folder / "training.json"
        kept = json.loads(done.read_text()) if done.is_file() else {}
        return dict(kept["cost"]) if kept.get("identity") == self.identity else None


def runs_of(arguments: Arguments, method: str) -> list[Run]:
    """A method's runs, one for each seed."""
    root = arguments.runs / arguments.budget
    first = arguments.seeds[0]
    return [Run(method, seed, arguments.seconds, root / f"{method}-{seed}", seed == first) for seed in arguments.seeds]


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


def prepare(method: str, seed: int, seconds: float, folder: Path, log: Path) -> Preparation:
    """Store trajectories of the teacher, or train the first stage, for a method that needs it: half of ``seconds``."""
    shutil.rmtree(folder, ignore_errors=True)
    half = seconds / 2
    if method in FROM_TRAJECTORIES:
        count = max(64, round(half / CPU_PER_TRAJECTORY))
        cost = measured_process(PRECOMPUTE.format(recipe=recipe_of(method), prepared=folder, count=count).split(), log)
        return Preparation(cost["cpu_seconds"], cost["cpu_seconds"], cost["wall_seconds"], {"data.path": folder})
    if method in FIRST_STAGES:
        first, roles = FIRST_STAGES[method]
        flags = {"config": recipe_of(first), "output": folder, "seed": seed, "trainer.max-cpu-seconds": half, **LOOP}
        cost = measured_process(["fastvideo.training.distillation", *as_words(flags | {"validation.every": 0})], log)
        starts = {f"roles.{role}.path": folder / "student" for role in roles}
        return Preparation(half, cost["cpu_seconds"], cost["wall_seconds"], starts)
    return Preparation()


def train(run: Run) -> dict[str, Any]:
    """Train within the budget, unless that is done already; what it cost.

    Raises:
        UserError: if the training fails, or its preparation takes the whole budget.
    """
    if run.cost is not None:
        return run.cost
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "figures.json").unlink(missing_ok=True)
    log, output = run.folder / "log.txt", run.folder / "run"
    log.write_text("")
    ahead = prepare(run.method, run.seed, run.seconds, run.folder / "prepared", log)
    budget = run.seconds - ahead.seconds
    if budget <= 0:
        raise UserError(f"{run.method}: its preparation alone took {ahead.seconds} of {run.seconds} CPU seconds")
    flags = {
        "config": recipe_of(run.method),
        "output": output,
        "seed": run.seed,
        "trainer.max-cpu-seconds": budget,
        **LOOP,
        "validation.every": max(5, round(run.seconds / VALIDATIONS / CPU_PER_STEP)) if run.curve else 0,
        "validation.world-prompts": 64,
        **ahead.flags,
    }
    shutil.rmtree(output, ignore_errors=True)  # a run that was cut off: what it cost is not known
    cost: dict[str, Any] = measured_process(["fastvideo.training.distillation", *as_words(flags)], log)
    cost["wall_seconds"] = round(cost["wall_seconds"] + ahead.wall_seconds, 1)
    cost["cpu_seconds"] = round(cost["cpu_seconds"] + ahead.cpu_seconds, 1)
    cost["train_steps"] = load_recipe(str(output / "student"))["steps"]
    (run.folder / "training.json").write_text(json.dumps({"identity": run.identity, "cost": cost}, indent=2) + "\n")
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


def evaluate(prompts: int, name: str, rows: Mapping[str, RowSpec], folder: Path, key: Any) -> dict[str, Any]:
    """Figures of each row, measured unless they are there; the first videos go into a file."""
    file = folder / "figures.json"
    key = {"prompts": prompts, "model": key}
    if file.is_file() and (kept := json.loads(file.read_text()))["identity"] == key:
        return dict(kept["rows"])
    torch.set_num_threads(1)
    found: Evaluation = evaluate_rows(rows, prompts=prompts, keep_videos=KEPT_VIDEOS)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({row: videos.contiguous() for row, videos in found.videos.items()}, folder / "videos.safetensors")
    figures = {row: found.rows[row].to_dict() for row in rows}
    file.write_text(json.dumps({"identity": key, "rows": figures}, indent=2) + "\n")
    print(
        f"{name}: " + ", ".join(f"{row} steps: Frechet {found.rows[row].frechet.value:.2f}" for row in rows), flush=True
    )
    return figures


def measure(run: Run, prompts: int) -> list[dict[str, Any]]:
    """Train a run and measure its student, unless that is done: its objects of ``results.json``.

    Raises:
        UserError: if the training fails.
    """
    cost = train(run)
    rows = rows_of(str(run.folder / "run" / "student"))
    figures = evaluate(prompts, f"{run.method}, seed {run.seed}", rows, run.folder, run.identity)
    return entries(run.method, figures, cost, run.seed)


def entries(
    method: str, figures: Mapping[str, Any], cost: Mapping[str, Any], seed: int | None = None
) -> list[dict[str, Any]]:
    """The objects of ``results.json`` for one method and training seed."""
    return [
        {
            "method": method,
            "seed": seed,
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


def on_the_page(arguments: Arguments) -> list[str]:
    """The methods that were asked for, and those whose runs are there anyway and still their recipes'."""
    wanted = chosen(arguments)

    def done(method: str) -> bool:
        return all(run.cost is not None for run in runs_of(arguments, method))

    return [name for name in METHODS if name in wanted or (recipe_of(name).is_file() and done(name))]


def main() -> int:
    """Measure, then write."""
    arguments = tyro.cli(Arguments)
    free = {"wall_seconds": 0.0, "peak_rss_mb": 0, "cpu_seconds": 0.0, "train_steps": 0}
    rows = {str(steps): RowSpec("tiny", steps=steps) for steps in TEACHER_STEPS}
    teacher = arguments.runs / "teacher"
    results = entries("teacher", evaluate(arguments.prompts, "teacher", rows, teacher, teacher_identity()), free)
    folders, failed = {"teacher": teacher}, {}
    for method in on_the_page(arguments):
        try:
            runs = runs_of(arguments, method)
            results += [row for run in runs for row in measure(run, arguments.prompts)]
            folders[method] = runs[0].folder
        except UserError as error:
            print(f"{method}: {error}", file=sys.stderr, flush=True)
            failed[method] = str(error)
    videos = {name: load_file(folder / "videos.safetensors") for name, folder in folders.items()}
    write_page(arguments, results, folders, videos, failed, environment())
    print(arguments.out)
    return 1 if failed else 0


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
