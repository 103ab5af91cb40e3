"""``make demo-stream``: from the shipped autoregressive teacher to a student that streams, measured against it.

Three trainings, consistency distillation, Self-Forcing and streaming tuning; then streams as long as in the first two,
and four times as long.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvideo.demo import PICTURE, is_earlier_demo, side_by_side, student_updates, train
from fastvideo.ranges import Threads

if TYPE_CHECKING:
    from fastvideo.evaluation.evaluate import Evaluation
    from fastvideo.evaluation.rows import RowSpec
    from fastvideo.evaluation.streams.goals import Goal
    from fastvideo.evaluation.streams.measure import StreamRow

RECIPES = Path("examples/distillation")
DEMO, SHORT_DEMO = Path("outputs/demo_stream"), Path("outputs/demo_stream_short")
STEPS = {"causal_cd": 100, "self_forcing": 400, "streaming_tuning": 300, "causvid": 400}
"""Steps of each training."""
SHORT_TRAINING = ["--trainer.max-steps", "2", "--data.size", "8", "--data.batch-size", "2", "--trainer.log-every", "1"]
NO_VALIDATION = ["--validation.every", "0"]
TEACHER_STEPS, SHORT_TEACHER_STEPS = 25, 2
KEPT_STREAMS = 4
EVALUATION_SEED = 0


@dataclass(frozen=True)
class StreamDemoArguments:
    """Distil a student that streams, measure it and report, end to end on this machine."""

    out: Path = DEMO
    """Output folder; an earlier demo there is replaced, and so are the folders of its other trainings beside it."""
    model: str = "tiny_stream"
    """The autoregressive teacher."""
    prompts: int = 128
    """Held-out prompts behind the figures."""
    long: int = 129
    """Frames of the long streams; training sees 33."""
    switches: int = 64
    """Prompt switches in streams of that length."""
    seed: int = 0
    """Seed of the trainings."""
    with_causvid: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train a CausVid student too, from the same start and for as many steps, and compare its exposure bias."""
    threads: Threads = 0
    """Threads of torch in the trainings; 0: those of the recipes. Another number sums in another order."""
    short: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take a few steps and prompts, to see that everything runs; the student is not a good one."""

    @property
    def folder(self) -> Path:
        """The output folder; a short demo leaves the long one's alone."""
        return SHORT_DEMO if self.short and self.out == DEMO else self.out


@dataclass(frozen=True)
class Extent:
    """Size of a measurement; ``reference``: real windows behind the reference of Frechet distances;
    ``vae_videos``: videos behind the VAE's goals."""

    prompts: int
    long: int
    switches: int
    teacher_steps: int
    reference: int
    vae_videos: int


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the last line on standard output is the goals as one JSON object."""
    arguments = tyro.cli(StreamDemoArguments, args=argv, prog="python -m fastvideo.demo_stream")
    from fastvideo.evaluation.figures import duration

    out = arguments.folder
    check(arguments)
    begin = time.monotonic()
    students, cost = distil(arguments)
    goals = evaluate(arguments, students, cost, begin)
    print_goals(goals, f"A student that streams, made and measured in {duration(time.monotonic() - begin)}")
    print(f"\n{out / 'report.html'}: streams as long as in training; {out / 'long' / 'report.html'}: longer ones")
    print(f"{out / 'metrics.json'}: the figures")
    print(json.dumps({goal.name: goal.to_dict() for goal in goals}))
    return 0


def check(arguments: StreamDemoArguments) -> None:
    """Check before the training what is measured after it.

    Raises:
        UserError: for a teacher that does not stream, or a length or number that cannot be measured.
    """
    from fastvideo.errors import UserError
    from fastvideo.evaluation.streams.measure import check_streams
    from fastvideo.evaluation.streams.sampling import StreamSource
    from fastvideo.evaluation.streams.world import StreamJudge
    from fastvideo.inference.loading import load_model

    extent, model = extent_of(arguments), load_model(arguments.model)
    if extent.switches < 2:
        raise UserError("--switches: at least 2 are expected, which have a spread")
    judge = StreamJudge(extent.prompts, EVALUATION_SEED, extent.long)
    source = StreamSource(arguments.model, model, model.sampler(), judge.frames, judge.seed, extent.prompts)
    if source.sampler.reach is None:
        raise UserError(
            f"--model {arguments.model} makes whole videos; a teacher whose recipe.json has `streaming` is expected"
        )
    check_streams(source, switches=True)


def distil(arguments: StreamDemoArguments) -> tuple[dict[str, str], dict[str, Any]]:
    """Train the students; returns their folders by method, and what the trainings of the last cost together."""
    from fastvideo.training.distillation import parse

    out = arguments.folder
    runs = {method: out.with_name(f"{out.name}_{method}") for method in ("causal_cd", "self_forcing", "causvid")}
    runs["streaming_tuning"] = out
    order: list[tuple[str, Path | None]] = [("causal_cd", None), ("self_forcing", runs["causal_cd"])]
    order.append(("streaming_tuning", runs["self_forcing"]))
    costs = [_train(arguments, method, runs[method], start) for method, start in order]
    if arguments.with_causvid:
        _train(arguments, "causvid", runs["causvid"], runs["causal_cd"])
    matched = [parse(["--config", str(runs[method] / "config.yaml")])[1] for method, _ in order[1:]]
    cost = {
        "wall_seconds": round(sum(one["wall_seconds"] for one in costs), 1),
        "peak_rss_mb": max(one["peak_rss_mb"] for one in costs),
        "student_updates": sum(map(student_updates, matched)),
    }
    students = ["self_forcing", "streaming_tuning", *(["causvid"] if arguments.with_causvid else [])]
    return {method: str(runs[method] / "student") for method in students}, cost


def _train(arguments: StreamDemoArguments, method: str, folder: Path, start: Path | None = None) -> dict[str, Any]:
    """Train into ``folder`` by the recipe of ``method``, from the student of the run in ``start``."""
    flags = ["--config", str(RECIPES / f"tiny_wan_{method}.yaml"), "--output", str(folder)]
    flags += ["--seed", str(arguments.seed), "--model.path", arguments.model]
    flags += ["--trainer.max-steps", str(STEPS[method])]
    flags += ["--trainer.threads", str(arguments.threads)] if arguments.threads else []
    flags += ["--roles.student.path", str(start / "student")] if start else []
    if arguments.short:
        flags += [*SHORT_TRAINING, *(NO_VALIDATION if start else [])]
    return train(flags, replace=is_earlier_demo(folder, arguments.folder, (DEMO, SHORT_DEMO)))


def evaluate(
    arguments: StreamDemoArguments, students: Mapping[str, str], cost: Mapping[str, Any], begin: float
) -> list[Goal]:
    """Measure the streams, write figures, pages and picture; returns the goals.

    ``metrics.json`` of the output folder has the streams as long as in training, and all goals; ``long`` the others.
    The goals are those of the student that was tuned.
    """
    from fastvideo.data.video_io import write_video
    from fastvideo.evaluation.report import write_report
    from fastvideo.evaluation.report_store import save_measured
    from fastvideo.evaluation.rows import RowSpec
    from fastvideo.evaluation.streams.goals import bias_goals, long_goals, short_goals
    from fastvideo.evaluation.streams.reconstruction import codec_goals
    from fastvideo.inference.loading import open_model

    out, extent = arguments.folder, extent_of(arguments)
    rows = compared(arguments.model, students["streaming_tuning"], extent.teacher_steps)
    teacher, untrained, student = rows
    short = measured(
        {**rows, "self_forcing": RowSpec(students["self_forcing"])}, extent, trained_frames(students["self_forcing"]), 0
    )
    streamed = students if "causvid" in students else {"streaming_tuning": students["streaming_tuning"]}
    long = measured({name: RowSpec(folder) for name, folder in streamed.items()}, extent, extent.long, extent.switches)
    goals = [*short_goals(*(short.rows[name] for name in (teacher, untrained, student)))]
    goals += long_goals(long.rows["streaming_tuning"])
    codec = open_model(arguments.model, {"num_frames": extent.long}).adapter.codec
    goals += codec_goals(codec, extent.long, extent.vae_videos)
    goals += bias_goals(long.rows["self_forcing"], long.rows["causvid"]) if "causvid" in students else []
    save_measured(out / "long", long)
    cost = {**cost, "demo_seconds": round(time.monotonic() - begin, 1)}
    save_measured(out, short, distillation=cost, goals={goal.name: goal.to_dict() for goal in goals})
    write_report([out / "long"])
    write_report([out])
    write_video(out / PICTURE, side_by_side(short.videos), scale=3)
    return goals


def extent_of(arguments: StreamDemoArguments) -> Extent:
    """The extent of a demo; a short one ignores the numbers."""
    if arguments.short:
        return Extent(prompts=4, long=33, switches=3, teacher_steps=SHORT_TEACHER_STEPS, reference=128, vae_videos=2)
    return Extent(arguments.prompts, arguments.long, arguments.switches, TEACHER_STEPS, reference=2048, vae_videos=128)


def compared(teacher: str, student: str, steps: int) -> dict[str, RowSpec]:
    """Rows of the guided teacher in many steps, of its weights under the student's sampler, and of the student."""
    from fastvideo.evaluation.rows import comparison_rows

    rows = comparison_rows(teacher, student, steps)
    few = next(int(name.removeprefix("untrained_")) for name in rows if name.startswith("untrained_"))
    return {name: rows[name] for name in (f"teacher_{steps}", f"untrained_{few}", f"student_{few}")}


def trained_frames(student: str) -> int:
    """Video frames that a student was trained on."""
    from fastvideo.inference.loading import load_recipe

    return int(load_recipe(student)["model"]["num_frames"])


def measured(rows: Mapping[str, RowSpec], extent: Extent, frames: int, switches: int) -> Evaluation[StreamRow]:
    """Measure streams of ``frames`` video frames, all rows on the same prompts and noise."""
    from fastvideo.evaluation.streams.measure import StreamTask, measure_streams
    from fastvideo.evaluation.streams.world import StreamJudge

    judge = StreamJudge(extent.prompts, EVALUATION_SEED, frames, extent.reference)
    return measure_streams(rows, StreamTask(judge, switches, keep=KEPT_STREAMS))


def print_goals(goals: Iterable[Goal], title: str) -> None:
    """A table of the goals on the terminal."""
    from rich.table import Table

    from fastvideo.cli.console import console

    table = Table("figure", "reached", "goal", "", title=title)
    for goal in goals:
        table.add_row(goal.name, f"{goal.value:.3f}", goal_text(goal), "" if goal.met else "missed")
    console().print(table)


def goal_text(goal: Goal) -> str:
    """The range of a goal, such as "at most 0.03"."""
    if math.isinf(goal.highest):
        return f"at least {goal.lowest:.3g}"
    return f"at most {goal.highest:.3g}" if math.isinf(goal.lowest) else f"{goal.lowest:.3g} to {goal.highest:.3g}"


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
