"""Quality of a student against the CPU seconds of its training, at 4, 2 and 1 steps, for live and averaged weights.

    python benchmarks/time_to_quality.py dmd2 --seed 0                       # one row of docs/time-to-quality.md
    python benchmarks/time_to_quality.py dmd2 --seed 0 1 2 --set method.generator_update_interval=4 ema.decay=0.9
    python benchmarks/time_to_quality.py dmd2 --split train --prompts 128    # to choose a setting by
    python benchmarks/time_to_quality.py --page                              # docs/time-to-quality.md

A run is the recipe ``examples/distillation/tiny_wan_METHOD.yaml`` with ``--set`` on top, on one thread, with this
project's trainer. Its clock is the CPU time of this process inside training steps, so other work on the machine, text
encoding, and everything that measures cost a run nothing; what a recipe needs done beforehand (stored trajectories, a
first stage) counts as in ``leaderboard.py``. At each mark the weights are written to RUNS/METHOD-SEED-DIGEST, and only
after the training they are measured. A run that is there is not trained again, a measured row is not measured again.
Settings are chosen with ``--split train``: figures of held-out prompts are for reporting. With ``--set
ema.post_hoc.every=4`` a run also keeps what averages of any width are made of (docs/averages.md): each is a row of the
training split, and the one that is best there at the most steps is the row ``post_hoc`` of held-out prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from leaderboard import prepare, recipe_of, sub_ladder, teacher_identity
from safetensors.torch import load_file, save_file
from time_to_quality_page import write_page
from torch import Tensor

from fastvideo.distillation.builder import Config, Method, build_adapter, build_families, build_on
from fastvideo.distillation.engine.optional.profiles import DEFAULT_STDS, Profile
from fastvideo.distillation.engine.optional.snapshots import Snapshots, averaged
from fastvideo.distillation.engine.saving import Saving
from fastvideo.distillation.engine.session import Session
from fastvideo.distillation.engine.training import tensors_of, training_of
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.errors import UserError
from fastvideo.evaluation.judge import Judge, Observed
from fastvideo.inference.sampler import Sampling, sample_batches
from fastvideo.training.data import build_data
from fastvideo.training.distillation import parse
from fastvideo.training.run import build_trainer
from fastvideo.training.texts import conditioners_of, encode_ahead

STEPS = (4, 2, 1)
WEIGHTS = ("averaged", "live")
POST_HOC = "post_hoc"
"""Weights of a row: the average that was chosen after the run; with a width behind it, one to choose from."""


@dataclass(frozen=True)
class Arguments:
    """Train methods of the tiny world and measure them at marks of CPU time."""

    methods: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of methods with a recipe for the tiny world."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the training; prompts and noise of the figures do not depend on them."""
    set: tuple[str, ...] = ()
    """Changes of the recipe, such as `method.generator_update_interval=4`."""
    marks: tuple[int, ...] = (60, 120, 180, 240, 300)
    """CPU seconds of training steps after which the weights are kept; the last one ends the run."""
    prompts: int = 512
    """Prompts behind each figure; all rows of a split get the same ones, and the same noise."""
    split: Literal["heldout", "train"] = "heldout"
    """Prompts that training never saw, for figures; those of the training split, for choices."""
    runs: Path = Path("outputs/time_to_quality")
    """Folder of runs and their figures."""
    page: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the page from what is measured on held-out prompts."""
    out: Path = Path("docs/time-to-quality.md")
    """The page; figures as JSON and pictures go beside it."""


@dataclass(frozen=True)
class Run:
    """One training: a method, a seed, changes of its recipe, and where its weights and figures are."""

    method: str
    seed: int
    settings: tuple[str, ...]
    marks: tuple[int, ...]
    root: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the run's weights depend on."""
        recipe = hashlib.sha256(recipe_of(self.method).read_bytes()).hexdigest()
        known = {"method": self.method, "seed": self.seed, "settings": sorted(self.settings), "marks": self.marks}
        return {**known, "recipe": recipe, "teacher": teacher_identity()}

    @property
    def folder(self) -> Path:
        """Its own folder."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]
        return self.root / f"{self.method}-{self.seed}-{digest}"

    @property
    def training(self) -> Path:
        """File that says that the training is over, and what it took."""
        return self.folder / "training.json"

    @property
    def figures(self) -> Path:
        """One JSON object per line: a mark, weights, a number of steps, prompts, and the figures."""
        return self.folder / "figures.jsonl"

    def snapshot(self, mark: int, weights: str) -> Path:
        """The student's weights at a mark."""
        return self.folder / f"{mark:04d}-{weights}.safetensors"


class Keeper:
    """Hook that writes the student's weights as the trainer's clock passes each mark."""

    def __init__(self, run: Run, trainer: DistillTrainer, ahead: float, snapshots: Sequence[Snapshots]) -> None:
        self.run, self.trainer, self.ahead, self.snapshots = run, trainer, ahead, snapshots
        self.marks = [mark for mark in run.marks if mark > ahead]
        self.passed: dict[int, dict[str, float]] = {}
        self.updates = 0

    def due(self, step: int) -> bool:
        """True: a step is settled at once, so that this hook never runs inside the next one and its clock."""
        return True

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Count the student's updates, and keep its weights if a mark is passed."""
        self.updates += "student" in active
        while self.marks and self.seconds >= self.marks[0]:
            mark = self.marks.pop(0)
            for weights, tensors in self.weights().items():
                save_file({name: t.contiguous() for name, t in tensors.items()}, self.run.snapshot(mark, weights))
            self.passed[mark] = {"seconds": round(self.seconds, 1), "train_steps": step, "updates": self.updates}

    @property
    def seconds(self) -> float:
        """CPU seconds of the training so far, with what was done before."""
        return self.ahead + self.trainer.cpu_seconds

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """The student's live weights, averaged ones where the recipe has some, and those made out of snapshots."""
        student = self.trainer.method.bundle["student"]
        averages = training_of(student).ema
        found: dict[str, Mapping[str, Tensor]] = {"live": {n: t.detach() for n, t in tensors_of(student).items()}}
        for one in self.snapshots:
            one.finish()
            for std in DEFAULT_STDS:
                found[f"{POST_HOC} {std:g}"] = averaged(one.folder, Profile(one.updates, std))[0]
        return found if averages is None else found | {"averaged": averages}


def config_of(run: Run, flags: Mapping[str, Any], seconds: float) -> Config:
    """The recipe on one thread, for ``seconds`` of steps, with the run's changes.

    Raises:
        UserError: for a change that is not ``key=value``, or that the recipe does not take.
    """
    given = [setting.partition("=") for setting in run.settings]
    if wrong := [key for key, equals, _ in given if not equals]:
        raise UserError(f"--set {wrong[0]}: key=value is expected, such as ema.decay=0.9")
    fixed = {
        "seed": run.seed,
        "output": run.folder / "run",
        "trainer.threads": 1,
        "trainer.max_steps": 10_000_000,
        "trainer.max_cpu_seconds": seconds,
        "validation.every": 0,
    }
    words = {**fixed, **flags, **{key: value for key, _, value in given}}
    flat = [word for key, value in words.items() for word in (f"--{key.replace('_', '-')}", *str(value).split())]
    return parse(["--config", str(recipe_of(run.method)), *flat])[1]


def train(run: Run, config: Config, session: Session, trainer: DistillTrainer, ahead: float) -> None:
    """Train from the first step to the last mark."""
    bundle = trainer.method.bundle
    conditioners = conditioners_of([role.adapter for role in bundle])
    data, _ = build_data(config, bundle["student"].adapter, session.processes, conditioners[1:])
    encode_ahead(config, conditioners, data, 0)
    snapshots = Saving(trainer.runtime).snapshots(config.ema.post_hoc, None)
    keeper = Keeper(run, trainer, ahead, snapshots)
    trainer.hooks = (*snapshots, keeper)
    trainer.run(data)
    run.training.write_text(json.dumps({"identity": run.identity, "marks": keeper.passed}, indent=2) + "\n")


def measured(run: Run) -> list[dict[str, Any]]:
    """Rows that are there."""
    return [json.loads(line) for line in run.figures.read_text().splitlines()] if run.figures.is_file() else []


def kept(run: Run, mark: int, prompts: int, split: str) -> dict[str, Path]:
    """Files of a mark by the weights of their rows: to choose from on the training split, chosen on the other."""
    files = {weights: run.snapshot(mark, weights) for weights in (*WEIGHTS, *candidates(run, mark))}
    if split == "heldout" and (stds := candidates(run, mark)):
        seen = {row["weights"]: row["frechet"]["value"] for row in measured(run) if is_choice(row, mark, prompts)}
        files = {weights: run.snapshot(mark, weights) for weights in WEIGHTS}
        files[POST_HOC] = run.snapshot(mark, min(stds, key=lambda weights: seen[weights]))
    return {weights: file for weights, file in files.items() if file.is_file()}


def candidates(run: Run, mark: int) -> list[str]:
    """Weights of a mark that were made out of snapshots."""
    return sorted(file.stem.partition("-")[2] for file in run.folder.glob(f"{mark:04d}-{POST_HOC} *.safetensors"))


def is_choice(row: Mapping[str, Any], mark: int, prompts: int) -> bool:
    """True for a row that an average of a mark is chosen by: as many training prompts, the most steps."""
    return (row["split"], row["mark"], row["prompts"], row["steps"]) == ("train", mark, prompts, STEPS[0])


def missing(run: Run, prompts: int, split: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """Keys of the rows that are not measured yet, newest mark first, with their weights."""
    marks = json.loads(run.training.read_text())["marks"]
    there = [{key: row[key] for key in ("mark", "weights", "steps", "prompts", "split")} for row in measured(run)]
    for mark in sorted(map(int, marks), reverse=True):
        for weights, file in kept(run, mark, prompts, split).items():
            for steps in STEPS:
                key = {"mark": mark, "weights": weights, "steps": steps, "prompts": prompts, "split": split}
                if key not in there:
                    yield {**key, **marks[str(mark)], "file": file.stem}, file


def choices(run: Run, prompts: int) -> list[tuple[dict[str, Any], Path]]:
    """Keys of the rows that averages are chosen by and that are not measured yet."""
    rows = missing(run, prompts, "train")
    return [(key, file) for key, file in rows if POST_HOC in key["weights"] and key["steps"] == STEPS[0]]


@torch.no_grad()
def measure(run: Run, method: Method, judge: Judge, wanted: Iterable[tuple[dict[str, Any], Path]]) -> None:
    """Measure rows and append them to the run's figures."""
    student = method.bundle["student"]
    for key, weights in wanted:
        for name, tensor in load_file(weights).items():
            tensors_of(student)[name].copy_(tensor)
        times = sub_ladder(method.ladder.times, key["steps"])
        sampler = SamplerSpec.student(Ladder(times), kind=method.sampler)
        sampling = Sampling(judge.prompts, sampler, judge.seed)
        codec = student.adapter.codec
        batches = [
            judge.observe(codec.decode(batch.latents).float().clamp(-1, 1))
            for batch in sample_batches(student.adapter, student, sampling)
        ]
        row = {**key, **figures_of(judge, Observed.join(batches))}
        with run.figures.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line_of(run, row), flush=True)


def figures_of(judge: Judge, seen: Observed) -> dict[str, Any]:
    """Distances and accuracies, each with its value and the ends of its interval."""
    features, pixels = judge.distances(seen)
    found = {"frechet": features, "frechet_pixel": pixels, **judge.accuracies(seen)}
    return {name: {k: round(v, 4) for k, v in asdict(figure).items()} for name, figure in found.items()}


def line_of(run: Run, row: Mapping[str, Any]) -> str:
    """A row as a line."""
    frechet, digit = row["frechet"], row["digit_accuracy"]
    return (
        f"{run.method} seed {run.seed} {' '.join(run.settings)} | {row['mark']} s, {row['updates']} updates, "
        f"{row['weights']}, {row['steps']} steps: Frechet {frechet['value']:.2f} [{frechet['low']:.2f}, "
        f"{frechet['high']:.2f}], pixel {row['frechet_pixel']['value']:.0f}, digit {digit['value']:.3f}"
    )


def do(run: Run, arguments: Arguments) -> None:
    """Train a run unless it is there, then measure what is missing."""
    trained = run.training.is_file()
    if not trained:
        shutil.rmtree(run.folder, ignore_errors=True)  # one that was cut off: its clock is not known
        (run.folder / "run").mkdir(parents=True)
    log = run.folder / "log.txt"
    ahead = None if trained else prepare(run.method, run.seed, run.marks[-1], run.folder / "prepared", log)
    seconds, flags = (0.0, {}) if ahead is None else (ahead.seconds, ahead.flags)
    config = config_of(run, flags, run.marks[-1] - seconds)
    with Session.open(config) as session:
        adapter = build_adapter(config, session.processes)
        method = build_on(config, build_families(config, adapter, session.processes), session.processes)
        if not trained:
            trainer = build_trainer(config, adapter, method, session.tracker, session.processes)
            train(run, config, session, trainer, seconds)
        if arguments.split == "heldout" and (rows := choices(run, arguments.prompts)):
            measure(run, method, Judge(arguments.prompts, 0, "train"), rows)
        judge = Judge(arguments.prompts, 0, arguments.split)
        measure(run, method, judge, missing(run, arguments.prompts, arguments.split))


def main() -> int:
    """Train and measure, or write the page."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for method in arguments.methods:
        if not recipe_of(method).is_file():
            raise UserError(f"{method}: there is no {recipe_of(method)}")
        for seed in arguments.seed:
            do(Run(method, seed, arguments.set, tuple(sorted(arguments.marks)), arguments.runs), arguments)
    if arguments.page:
        write_page(arguments.runs, arguments.out)
    return 0


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
