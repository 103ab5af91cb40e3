"""``fastvideo evaluate --teacher``: sample, measure, print and store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvideo.cli.evaluate import KEPT_VIDEOS, EvaluateArguments, row_specs, shown, world_prompts, write_out
from fastvideo.errors import UserError
from fastvideo.shares import Share
from fastvideo.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from fastvideo.evaluation.choice import Choice
    from fastvideo.evaluation.evaluate import Evaluation
    from fastvideo.evaluation.judge import Judge
    from fastvideo.evaluation.measure import Opened, Task
    from fastvideo.evaluation.metric import Metric
    from fastvideo.evaluation.metrics import JudgedRow


FEW = 64
"""Prompts below which intervals are too wide to tell most models apart."""


class Prompts(NamedTuple):
    """Prompts of a measurement; if they are the tiny world's, its judge, or the reason why it judges no such video."""

    texts: tuple[str, ...]
    judge: Judge | None = None
    unjudged: str | None = None


def run_against_teacher(arguments: EvaluateArguments, console: Console) -> None:
    """Sample and measure the models and their teacher; print the table, write ``arguments.out``.

    Raises:
        UserError: for a mistake in the call, before anything is sampled.
    """
    from fastvideo.evaluation.choice import absent, check_teacher, choose, external_metrics, of_frames
    from fastvideo.evaluation.measure import batch_size_for, measure, open_rows, sample_rows
    from fastvideo.evaluation.measuring import video_shape
    from fastvideo.evaluation.report_store import check_measurable

    choice = choose(arguments.metrics, arguments.clip, arguments.fvd_extractor)
    out, share = _out(arguments), Share.parse(arguments.share or "1/1", "--share")
    check_measurable(out)
    prompts = read_task_prompts(arguments)
    task = make_task(arguments, out, prompts, choice)
    rows = open_rows(task)
    adapter = rows[task.teacher].model.adapter
    task = replace(task, batch_size=arguments.batch_size or batch_size_for(adapter.codec.latent_shape))
    choice, short = of_frames(choice, arguments.metrics, video_shape(adapter)[0])
    check_teacher(choice, rows[task.teacher].model, task.prompts, arguments.data)
    external = [] if arguments.share else external_metrics(choice, task.device)
    count = sample_rows(task, rows, share)
    console.print(f"{counted(count, 'video')} sampled into {out}/samples, {_reused(rows, count, share)} reused")
    if arguments.share:
        return
    metrics, notes = build(task, rows, choice, prompts.judge, arguments.data)
    evaluation = measure(task, rows, [*metrics, *external], KEPT_VIDEOS, notes)
    console.print(table(evaluation, task.teacher))
    if len(task.prompts) < FEW:
        console.print(f"[dim]{len(task.prompts)} prompts are few for distances and shares: take {FEW} or more[/dim]")
    truth = [("the tiny world's truth", prompts.unjudged)] if prompts.unjudged else []
    for name, remedy in [*truth, *short, *absent(choice)]:
        console.print(f"[dim]not measured: {name}: {remedy}[/dim]", highlight=False)
    console.print(write_out(out, evaluation), highlight=False)


def _out(arguments: EvaluateArguments) -> Path:
    if arguments.out is None or arguments.out.suffix == ".json":
        raise UserError("--teacher needs --out FOLDER: it keeps the samples, so that a stopped measurement continues")
    return arguments.out


def _reused(rows: Mapping[str, Opened], sampled: int, share: Share) -> int:
    return sum(number in share for row in rows.values() for number in range(len(row.samples.files))) - sampled


def read_task_prompts(arguments: EvaluateArguments) -> Prompts:
    """The prompts in the file, or as many of the tiny world as are asked for.

    Raises:
        UserError: for a bad file, or a number of prompts for a teacher of another world.
    """
    from fastvideo.data.prompts import read_prompts
    from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
    from fastvideo.evaluation.judge import Judge
    from fastvideo.evaluation.measuring import unjudged
    from fastvideo.inference.loading import load_recipe, open_model

    if isinstance(arguments.prompts, str):
        return Prompts(tuple(read_prompts(arguments.prompts)))
    spec = next(iter(row_specs([arguments.teacher or ""]).values()))
    if spec.folder not in EMBEDDED and load_recipe(spec.folder).get("model", {}).get("path") not in EMBEDDED:
        raise UserError(f"--prompts FILE: {spec.folder} needs prompts of its own world, one per line in a text file")
    judge = Judge(world_prompts(arguments), arguments.seed)
    reason = unjudged(open_model(spec.folder).adapter)
    return Prompts(judge.prompts, judge if reason is None else None, reason)


def make_task(arguments: EvaluateArguments, out: Path, prompts: Prompts, choice: Choice) -> Task:
    """The measurement that the arguments ask for.

    Raises:
        UserError: for a row that is not FOLDER or FOLDER:STEPS.
    """
    from fastvideo.evaluation.measure import Task

    teacher = arguments.teacher or ""
    students = row_specs(arguments.folders, arguments.guidance, arguments.ladder)
    repeated = None if "seed_diversity" in choice.names else ()
    if prompts.judge is not None:
        repeated = tuple(prompts.judge.diversity_task.positions.tolist())
    options = {} if arguments.precision is None else {"precision": arguments.precision}
    rows = {**row_specs([teacher]), **students}
    return Task(rows, teacher, prompts.texts, arguments.seed, out, repeated, device=arguments.device, options=options)


def build(
    task: Task, rows: Mapping[str, Opened], choice: Choice, judge: Judge | None, data: Path | None
) -> tuple[list[Metric], dict[str, Any]]:
    """The metrics of the teacher and of the tiny world's judge, and settings to note beside the figures."""
    from fastvideo.evaluation.choice import teacher_metrics
    from fastvideo.evaluation.evaluate import vae_floor
    from fastvideo.evaluation.instrument import Instrument
    from fastvideo.evaluation.measure import SEEDS
    from fastvideo.evaluation.truth import WorldDiversity, WorldTruth
    from fastvideo.evaluation.user_data import data_features
    from fastvideo.inference.loading import with_network

    teacher = rows[task.teacher].model
    instrument = Instrument(with_network(teacher)) if choice.needs_network else None
    features: Tensor | None = None
    notes: dict[str, Any] = {"metrics": ", ".join(choice.names)}
    if data is not None and instrument is not None:
        features = data_features(data, teacher, instrument, len(task.prompts), task.batch_size)
        notes |= {"data": str(data), "data_videos": len(features)}
    metrics = teacher_metrics(choice, instrument, task.prompts, features, SEEDS)
    if judge is not None:
        metrics += [WorldTruth(judge, vae_floor(teacher, judge, task.batch_size)), WorldDiversity(judge)]
        notes |= {"split": judge.world.split, "reference_videos": judge.reference_videos}
    return metrics, notes


def table(evaluation: Evaluation[JudgedRow], teacher: str) -> Table:
    """All rows with their intervals, a figure per line."""
    from rich.table import Table

    from fastvideo.evaluation.catalogue import RELATIVE, present

    rows = evaluation.rows
    first = next(iter(rows.values()))
    ratios = ", ".join(figure.head for figure in present(first.values, RELATIVE) if figure.target == 1.0)
    out = Table(
        title=f"{first.samples} prompts, judged by {teacher}; 95 % bootstrap intervals",
        caption=f"{ratios}: 1 is the teacher's" if ratios else None,
    )
    out.add_column("figure", no_wrap=True)
    for name in rows:
        out.add_column(name, justify="right", overflow="fold")
    out.add_row("network calls", *(str(row.network_calls) for row in rows.values()))
    for figure in present(first.values):
        cells = [shown(row.values[figure.key], max(figure.digits, 2)) for row in rows.values()]
        out.add_row(_label(figure.head, figure.floor, first), *cells)
    out.add_row("s / video", *(f"{row.denoise_seconds_per_video:.4f}" for row in rows.values()))
    return out


def _label(head: str, floor: str, first: JudgedRow) -> str:
    return f"{head}\n[dim]floor {first.values[floor]:.3g}[/dim]" if floor in first.values else head
