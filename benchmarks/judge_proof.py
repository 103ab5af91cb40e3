"""Does the judge of `fastvideo evaluate --teacher` rank models as the truth does? On the tiny world, where it is known.

python benchmarks/judge_proof.py

Models: the teacher at several steps, with and without guidance, students of several methods at 4, 2 and 1 steps, and
three degraded copies of the teacher's videos. Students that are missing in RUNS are trained first, briefly, so that
their qualities differ. Samples and observations are kept in OUT: the same call again continues.
Prints a row per model, and as last line one JSON object with the rank correlations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from leaderboard import LOOP, as_words, measured_process, recipe_of, sub_ladder
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from fastvideo.evaluation.choice import OWN, choose, teacher_metrics
from fastvideo.evaluation.figures import difference
from fastvideo.evaluation.health import LUMINANCE
from fastvideo.evaluation.instrument import Instrument
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.measure import (
    SEEDS,
    Looked,
    Opened,
    Task,
    judged_figures,
    judged_row,
    look,
    open_rows,
    sample_rows,
)
from fastvideo.evaluation.metric import Batch, Figures, Metric, Seen
from fastvideo.evaluation.rows import RowSpec
from fastvideo.evaluation.samples import FOLDER, Samples
from fastvideo.evaluation.statistics import estimate, weighted_mean
from fastvideo.evaluation.truth import WorldTruth
from fastvideo.inference.loading import OpenedModel, load_recipe, with_network

TEACHER = "tiny:50"
HURRIED = ((8, None), (4, None), (2, None), (1, None), (4, 1.0), (2, 1.0))
"""Steps and guidance of the teacher's other rows."""
STEPS = (4, 2, 1)
STUDENTS = ("dmd2:40", "cm:40", "mean_flow:40", "rcm:40", "ladd:40")
"""Methods with the CPU seconds of their training."""
PAIRS = {"fd_teacher": "frechet", "prompt_match": "digit_accuracy", "motion": "displacement"}
"""Figures with their truths."""
SHOWN = ("fd_teacher", "frechet", "prompt_match", "digit_accuracy", "motion", "displacement")
TELLING = {"blurred": "sharpness", "wrong captions": "prompt_match", "frozen": "motion"}
"""The figure that must tell each degradation from the teacher."""
BATCH = 32


@dataclass(frozen=True)
class Arguments:
    """Compare the judge's figures with the truth."""

    runs: Path = Path("outputs/judge/runs")
    """Trained runs, one folder each with a model folder `student` in it."""
    train: bool = True
    """Train the students that are missing."""
    prompts: int = 192
    """Held-out prompts."""
    out: Path = Path("outputs/judge")
    """Where samples and figures are kept."""
    students: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD:SECONDS...")] = STUDENTS
    """Students to train and measure."""


class Displacement(Metric):
    """True motion: how far the centre of the digit moves per frame, in pixels."""

    def observe(self, batch: Batch) -> Seen:
        light = torch.einsum("bcthw,c->bthw", (batch.videos + 1) / 2, torch.tensor(LUMINANCE))
        light = light.where(light > 0.1, torch.zeros(()))
        mass, place = light.sum((2, 3)).clamp_min(1e-3), torch.arange(light.shape[-1]).float()
        centre = torch.stack([(light.sum(2) * place).sum(2) / mass, (light.sum(3) * place).sum(2) / mass])
        return {"moved": centre.diff(dim=2).square().sum(0).sqrt().mean(1).double()}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        value, resampled = weighted_mean(seen["moved"], counts)
        return {"displacement": estimate(value, resampled, len(seen["moved"]))}


def blurred(videos: Tensor) -> Tensor:
    """Videos through a box of 5 x 5 pixels."""
    frames = videos.transpose(1, 2).flatten(0, 1)
    soft = F.avg_pool2d(frames, 5, 1, 2, count_include_pad=False)
    return soft.unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()


def frozen(videos: Tensor) -> Tensor:
    """The first frame, repeated."""
    return videos[:, :, :1].expand_as(videos).contiguous()


DEGRADED: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "blurred": blurred,
    "frozen": frozen,
    "wrong captions": None,
}
"""Change of the teacher's videos; ``None`` gives each the latents of the prompt before."""


def trained(arguments: Arguments) -> list[Path]:
    """Model folders of the students, after training those that are missing."""
    found = []
    for student in arguments.students:
        method, _, seconds = student.partition(":")
        run = arguments.runs / f"{method}-{seconds}"
        if not (run / "student").is_dir() and arguments.train:
            arguments.runs.mkdir(parents=True, exist_ok=True)
            flags = {"config": recipe_of(method), "output": run, "trainer.max-cpu-seconds": seconds, **LOOP}
            command = ["fastvideo.training.distillation", *as_words(flags | {"validation.every": 0})]
            measured_process(command, arguments.runs / f"{method}-{seconds}.log")
        if (run / "student").is_dir():
            found.append(run / "student")
    return found


def rows_of(students: Sequence[Path]) -> dict[str, RowSpec]:
    """Every model with its sampler."""
    rows = {TEACHER: RowSpec("tiny", steps=50)}
    for steps, guidance in HURRIED:
        rows[f"tiny:{steps}" + ("" if guidance is None else f" guidance {guidance:g}")] = RowSpec(
            "tiny", steps, guidance
        )
    for folder in students:
        ladder = load_recipe(str(folder))["ladder"]
        for steps in STEPS:
            rows[f"{folder.parent.name}:{steps}"] = RowSpec(str(folder), ladder=sub_ladder(ladder, steps))
    return rows


def degrade(task: Task, teacher: Opened, name: str) -> Samples:
    """A degraded copy of the teacher's samples."""
    source, codec, change = teacher.samples, teacher.model.adapter.codec, DEGRADED[name]
    made = Samples(task.out / FOLDER, {"degraded": name, "of": source.folder.name}, source.clips)
    for rows, latents in source.batches(made.missing(), BATCH):
        if change is None:
            changed = source.read([row - 1 for row in rows])
        else:
            changed = codec.encode(change(codec.decode(latents).float().clamp(-1, 1))).float()
        made.write(rows, changed, 0.0)
    return made


def observed(task: Task, samples: Samples, metrics: Sequence[Metric], teacher: OpenedModel, name: str) -> Looked:
    """What the metrics saw of a model, from an earlier call where there is one."""
    file = task.out / "observed" / f"{samples.folder.name}-{len(task.prompts)}.safetensors"
    if not file.is_file():
        looked = look(task, samples, metrics, teacher, 1, name)
        flat = {f"{i} {key}": v for i, m in enumerate(metrics) for key, v in looked.seen[m].items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in flat.items()}, file)
    kept = load_file(file)
    seen = {
        metric: {key.partition(" ")[2]: v for key, v in kept.items() if key.partition(" ")[0] == str(i)}
        for i, metric in enumerate(metrics)
    }
    return Looked(seen, torch.zeros(1), 0.0)


def figures_of(task: Task, rows: Mapping[str, Opened], judge: Judge) -> dict[str, dict[str, Any]]:
    """All figures of all models, by name."""
    teacher = rows[task.teacher]
    instrument = Instrument(with_network(teacher.model))
    metrics = teacher_metrics(choose(OWN, None, None), instrument, task.prompts, None, SEEDS)
    metrics += [WorldTruth(judge, (0.0, 0.0)), Displacement()]
    samples = {name: row.samples for name, row in rows.items()}
    samples |= {name: degrade(task, teacher, name) for name in DEGRADED}
    found, theirs = {}, None
    for name, some in samples.items():
        ours = observed(task, some, metrics, teacher.model, name)
        theirs = theirs or ours
        figures = judged_figures(task, metrics, ours, theirs)
        found[name] = judged_row(task, rows.get(name, teacher), figures, ours, 0.0).to_dict()
        print(f"{name:24s}", "  ".join(f"{key} {found[name][key]:.3f}" for key in SHOWN), flush=True)
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rank correlations with the truth, and which degradation is told from the teacher by which figures."""
    result: dict[str, Any] = {"models": len(found)}
    for figure, truth in PAIRS.items():
        values = [[row[key] for row in found.values()] for key in (figure, truth)]
        result[f"{figure}_vs_{truth}"] = round(float(spearmanr(*values)[0]), 3)
    told = {name: [key for key in OWN if _sure(found[name], found[TEACHER], key)] for name in DEGRADED}
    result["told_apart"] = told
    result["degradations_found"] = sum(figure in told[name] for name, figure in TELLING.items())
    return result


def _sure(row: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> bool:
    found = difference(row, teacher, key)
    return found is not None and found.sure


def proof(arguments: Arguments) -> dict[str, Any]:
    """Train, sample, measure, compare; what an earlier call kept is used again."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    judge = Judge(arguments.prompts, 0)
    rows = rows_of(trained(arguments))
    task = Task(rows, TEACHER, judge.prompts, 0, arguments.out, batch_size=BATCH)
    opened = open_rows(task)
    sample_rows(task, opened)
    found = figures_of(task, opened, judge)
    (arguments.out / "proof.json").write_text(json.dumps(found, indent=2) + "\n")
    return {**summary(found), "prompts": arguments.prompts, "seconds": round(time.monotonic() - begin)}


def measured() -> dict[str, Any]:
    """The proof with its defaults, as figures of `real_runs.py`."""
    return {f"judge_{key}": value for key, value in proof(Arguments()).items()}


def main() -> int:
    """Print the result as one JSON object."""
    print(json.dumps(proof(tyro.cli(Arguments))))
    return 0


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
