"""``make demo-families``: what a teacher of images adds to a student of videos, measured in the soft world.

The video teacher knows half the resolution; the frame teacher, a tiny SDXL, knows sharp stills and nothing of motion.
Arms of one seed differ in the frame term alone: without it, at low noise, at all noise, without the video term, and
with a frame teacher that takes words for others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro
import yaml

from fastvideo.demo import PICTURE, is_earlier_demo, side_by_side, student_updates, train_config
from fastvideo.demo_stream import print_goals
from fastvideo.tiny.paths import STILLS_FOLDER
from fastvideo.tiny.shuffled import with_shuffled_words
from fastvideo.tiny.world import Split

if TYPE_CHECKING:
    from fastvideo.evaluation.metrics import Row
    from fastvideo.evaluation.rows import RowSpec
    from fastvideo.evaluation.stills import FrameTrial
    from fastvideo.evaluation.streams.goals import Goal

RECIPES = Path("examples/distillation")
DEMO, SHORT_DEMO = Path("outputs/demo_families"), Path("outputs/demo_families_short")
VIDEO_TEACHER, FRAME_TEACHER = "tiny_soft", "tiny_stills"
FIGURES = ("digit", "colour", "direction", "sharpness", "frechet")
SHORT_PROMPTS, TEACHER_STEPS, SHORT_TEACHER_STEPS = 48, 50, 4
KEPT_VIDEOS, SHORT_REFERENCE = 12, 256
MOTION_LOST = 0.8
"""Share of directions read right below which motion counts as lost."""
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        title: of its line in the table.
        method: options of the method, on top of the recipe's.
        frames: it has a frame teacher.
        shuffled: one that takes words for others.
    """

    title: str
    method: Mapping[str, Any] = field(default_factory=dict)
    frames: bool = True
    shuffled: bool = False


ARMS = {
    "video": Arm("video teacher alone", frames=False),
    "frames": Arm("+ frame teacher, low noise"),
    "all_noise": Arm("+ frame teacher, all noise", {"frame_time_range": [0.05, 0.93]}),
    "frames_only": Arm("frame teacher alone", {"video_weight": 0.0, "allow_frames_only": True}),
    "shuffled": Arm("+ frame teacher, words exchanged", shuffled=True),
}


@dataclass(frozen=True)
class FamiliesDemoArguments:
    """Distil students under a video teacher and a teacher of images, measure them and report, on this machine."""

    out: Path = DEMO
    """Output folder; an earlier demo there is replaced."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to train."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; each trains every arm."""
    prompts: int = 512
    """Held-out prompts behind the figures."""
    untested: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a frame teacher that the judge did not admit."""
    short: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take a few steps and prompts, to see that everything runs; the students are no good ones."""

    @property
    def folder(self) -> Path:
        """The output folder; a short demo leaves the long one's alone."""
        return SHORT_DEMO if self.short and self.out == DEMO else self.out

    @property
    def runs(self) -> dict[str, tuple[str, int]]:
        """Arm and seed of each run, by its name."""
        return {f"{arm}_{seed}": (arm, seed) for seed in self.seeds for arm in self.arms}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the last line on standard output is the goals as one JSON object."""
    arguments = tyro.cli(FamiliesDemoArguments, args=argv, prog="python -m fastvideo.demo_families")
    check(arguments)
    trial = admit(arguments)
    costs = {name: train_arm(arguments, name) for name in arguments.runs}
    stills = train_stills(arguments)
    trials = {split: found.to_dict() for split, found in trial.items()}
    goals = evaluate(arguments, {"trial": trials, "trainings": costs, "stills": stills})
    print(f"\n{arguments.folder / 'report.html'}: figures and videos\n{arguments.folder / 'metrics.json'}: the figures")
    print(json.dumps({goal.name: goal.to_dict() for goal in goals}))
    return 0


def check(arguments: FamiliesDemoArguments) -> None:
    """Refuse unknown arms, and none.

    Raises:
        UserError: naming those that there are.
    """
    from fastvideo.errors import UserError

    unknown = [arm for arm in arguments.arms if arm not in ARMS]
    if unknown or not arguments.runs:
        named = " ".join(unknown) or "(none)"
        raise UserError(f"--arms {named}: one or more of {', '.join(ARMS)} are expected, and at least one seed")


def admit(arguments: FamiliesDemoArguments) -> dict[Split, FrameTrial]:
    """Try the frame teacher by the judge, before any arm; returns its trial on both splits.

    It is admitted by the train split, as all that is decided before the figures.

    Raises:
        UserError: if it is not admitted.
    """
    from fastvideo.errors import UserError
    from fastvideo.evaluation.stills import try_frame_teacher
    from fastvideo.inference.loading import load_model

    model, count = load_model(FRAME_TEACHER), SHORT_PROMPTS if arguments.short else arguments.prompts
    trials: dict[Split, FrameTrial] = {}
    for split in get_args(Split):
        trials[split] = try_frame_teacher(model, count, split)
        print(f"trial of the frame teacher, {split} split: {trials[split]}")
    refusal = trials["train"].refusal
    if refusal and not (arguments.short or arguments.untested):
        raise UserError(f"the frame teacher is not admitted: {refusal}; --untested goes on with it")
    return trials


def recipe(name: str) -> dict[str, Any]:
    """Values of a recipe of this demo."""
    values: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def train_arm(arguments: FamiliesDemoArguments, name: str) -> dict[str, Any]:
    """Train the student of a run; returns wall time and peak memory."""
    which, seed = arguments.runs[name]
    values = arm_values(ARMS[which], arguments.folder)
    return _train(arguments, values | {"seed": seed}, arguments.folder / name)


def arm_values(arm: Arm, folder: Path) -> dict[str, Any]:
    """Config of an arm. Without a frame teacher it is the same recipe of plain DMD2."""
    values = recipe("tiny_wan_sdxl_frames")
    if not arm.frames:
        values["distill_method"] = "dmd2"
        values["roles"] = {name: role for name, role in values["roles"].items() if not name.startswith("frame_")}
        own = ("frame", "trust_frame")
        values["method"] = {name: value for name, value in values["method"].items() if not name.startswith(own)}
    values["method"] |= arm.method
    if arm.shuffled:
        other = with_shuffled_words(STILLS_FOLDER, folder / "shuffled_words")
        for name in ("frame_teacher", "frame_critic"):
            values["roles"][name]["model"] = values["roles"][name]["model"] | {"path": str(other)}
    return values


def train_stills(arguments: FamiliesDemoArguments) -> dict[str, Any]:
    """Distil the frame teacher itself into a 4-step student; returns what both show, and what it cost."""
    from fastvideo.evaluation.stills import sampled_stills, shown
    from fastvideo.inference.loading import load_model
    from fastvideo.tiny.world import TinyWorld

    folder = arguments.folder / "stills"
    cost = _train(arguments, recipe("tiny_sdxl_dmd2"), folder)
    prompts = TinyWorld("heldout").sample_captions(
        SHORT_PROMPTS if arguments.short else arguments.prompts, EVALUATION_SEED
    )
    found: dict[str, Any] = {"training": cost}
    for name, path in (("teacher", FRAME_TEACHER), ("student", str(folder / "student"))):
        model = load_model(path)
        found[name] = shown(sampled_stills(model, prompts, model.sampler(), EVALUATION_SEED), prompts)
    return found


def _train(arguments: FamiliesDemoArguments, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    from fastvideo.distillation.config.reading import config_of

    values = values | {"output": str(folder)}
    if arguments.short:
        values["trainer"] = values["trainer"] | {"max_steps": 4, "log_every": 1}
        values["data"] = values["data"] | {"size": 16, "batch_size": 4}
        few = {"frame_warmup_steps": 1, "frame_videos": 2}
        values["method"] = values["method"] | (few if values["distill_method"] == "dmd2_frames" else {})
    config = config_of(values, str(folder))
    cost = train_config(config, replace=is_earlier_demo(folder, arguments.folder, (DEMO, SHORT_DEMO)))
    return {**cost, "student_updates": student_updates(config)}


def evaluate(arguments: FamiliesDemoArguments, more: Mapping[str, Any]) -> list[Goal]:
    """Measure teacher, untrained sampler and students on the same prompts and noise, write the page; returns goals."""
    from fastvideo.data.video_io import write_video
    from fastvideo.evaluation.evaluate import evaluate_rows
    from fastvideo.evaluation.judge import REFERENCE_VIDEOS, Judge
    from fastvideo.evaluation.report import write_report
    from fastvideo.evaluation.report_store import save_measured
    from fastvideo.evaluation.stills import sharpness

    out, prompts = arguments.folder, SHORT_PROMPTS if arguments.short else arguments.prompts
    judge = Judge(prompts, EVALUATION_SEED, reference=SHORT_REFERENCE if arguments.short else REFERENCE_VIDEOS)
    found = evaluate_rows(compared(arguments), prompts=prompts, keep_videos=prompts, judge=judge)
    scale = sharpness(judge.real_videos())
    figures = {name: figures_of(found.rows[name], sharpness(videos) / scale) for name, videos in found.videos.items()}
    goals = list(goals_of(arguments, figures, more["stills"]))
    kept = {name: videos[:KEPT_VIDEOS] for name, videos in found.videos.items()}
    verdicts = {goal.name: goal.to_dict() for goal in goals}
    found = replace(found, videos=kept, prompts=found.prompts[:KEPT_VIDEOS])
    save_measured(out, found, families={"arms": figures, **more}, goals=verdicts)
    write_report([out])
    write_video(out / PICTURE, side_by_side(kept), scale=3)
    print_table(arguments, figures, goals)
    return goals


def compared(arguments: FamiliesDemoArguments) -> dict[str, RowSpec]:
    """Rows of the video teacher, of its weights under the students' sampler, and of every student."""
    from fastvideo.evaluation.rows import RowSpec, comparison_rows

    folders = {name: str(arguments.folder / name / "student") for name in arguments.runs}
    steps = SHORT_TEACHER_STEPS if arguments.short else TEACHER_STEPS
    rows = comparison_rows(VIDEO_TEACHER, next(iter(folders.values())), steps)
    kept = {name: row for name, row in rows.items() if name == f"teacher_{steps}" or name.startswith("untrained_")}
    return kept | {name: RowSpec(folder) for name, folder in folders.items()}


def figures_of(row: Row, sharp: float) -> dict[str, float]:
    """The figures of a row that the arms are compared by; ``sharp`` is its sharpness over that of real videos."""
    read = {name: getattr(row, f"{name}_accuracy").value for name in ("digit", "colour", "direction")}
    return {**read, "sharpness": sharp, "frechet": row.frechet.value}


def mean_of(arguments: FamiliesDemoArguments, figures: Mapping[str, Mapping[str, float]], arm: str) -> dict[str, float]:
    """Mean over seeds of each figure of an arm."""
    rows = [figures[name] for name, (which, _) in arguments.runs.items() if which == arm]
    return {figure: statistics.fmean(row[figure] for row in rows) for figure in FIGURES}


def goals_of(
    arguments: FamiliesDemoArguments, figures: Mapping[str, Mapping[str, float]], stills: Mapping[str, Any]
) -> Iterator[Goal]:
    """Goals over the means of all seeds, as far as their arms were trained."""
    from fastvideo.evaluation.streams.goals import Goal

    means = {arm: mean_of(arguments, figures, arm) for arm in arguments.arms}
    video, frames = means.get("video"), means.get("frames")
    if video:
        yield Goal("video_digit", video["digit"], highest=0.85)
    if frames:
        yield Goal("frames_digit", frames["digit"], lowest=0.93)
        yield Goal("frames_sharpness", frames["sharpness"], lowest=0.50)
        yield Goal("frames_direction", frames["direction"], lowest=0.98)
    if video and frames:
        yield Goal("frames_frechet_over_video", frames["frechet"] / video["frechet"], highest=0.75)
    if video and "frames_only" in means:
        yield Goal("frames_only_motion_lost", motion_lost(means["frames_only"], video), lowest=1.0)
    if frames and "shuffled" in means:
        yield Goal("shuffled_digit_below_frames", frames["digit"] - means["shuffled"]["digit"], lowest=0.1)
    yield Goal("still_student_digit_over_teacher", stills["student"]["digit"] / stills["teacher"]["digit"], lowest=0.95)


def motion_lost(alone: Mapping[str, float], video: Mapping[str, float]) -> float:
    """1 if direction is read right in at most 0.8 of the videos, or their distance from real ones is above (a)'s."""
    return float(alone["direction"] <= MOTION_LOST or alone["frechet"] > video["frechet"])


def print_table(
    arguments: FamiliesDemoArguments, figures: Mapping[str, Mapping[str, float]], goals: Sequence[Goal]
) -> None:
    """Print the arms' figures, and the goals."""
    from rich.table import Table

    from fastvideo.cli.console import console

    table = Table("", *FIGURES, title="Sharp videos from a soft video teacher and a teacher of stills")
    for name, row in figures.items():
        arm, seed = arguments.runs.get(name, (name, None))
        title = name if seed is None else f"{ARMS[arm].title} (seed {seed})"
        table.add_row(title, *(f"{row[figure]:.3f}" for figure in FIGURES))
    console().print(table)
    print_goals(goals, "A frame teacher beside a video teacher")


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
