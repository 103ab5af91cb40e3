"""``make demo``: distil the embedded teacher, measure it against its student, write a report page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.distillation.builder import Config

CONFIG = Path("examples/distillation/tiny_wan_dmd2.yaml")
DEMO, SHORT_DEMO = Path("outputs/demo"), Path("outputs/demo_short")
SHORT = ["--trainer.max-steps", "10", "--validation.every", "5", "--validation.world-prompts", "16"]
SHORT_PROMPTS = 48
PICTURE = "comparison.gif"
"""Picture in the output folder, the demo's last file."""
VIDEOS, SHORT_VIDEOS = 1024, 64
"""Video files that the demo writes and reads back."""


@dataclass(frozen=True)
class DemoArguments:
    """Distil, evaluate and report, end to end on this machine."""

    config: Path = CONFIG
    """The recipe."""
    out: Path = DEMO
    """Output folder; an earlier demo there is replaced."""
    prompts: int = 512
    """Held-out prompts behind the figures."""
    seed: int = 0
    """Seed of the training."""
    short: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take a few steps and prompts, to see that everything runs; the student is not a good one."""


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    arguments = tyro.cli(DemoArguments, args=argv, prog="python -m fastvideo.demo")
    out = arguments.out
    if arguments.short and out == DEMO:
        out = SHORT_DEMO
    training = distil(arguments, out)
    prompts = SHORT_PROMPTS if arguments.short else arguments.prompts
    evaluate(out, prompts, training)
    print(f"\n{out / 'report.html'}: open it in a browser\n{out / 'metrics.json'}: the figures")
    return 0


def distil(arguments: DemoArguments, out: Path) -> dict[str, Any]:
    """Train the student; returns wall time, updates and peak memory."""
    from fastvideo.training.distillation import parse

    flags = ["--config", str(arguments.config), "--output", str(out), "--seed", str(arguments.seed)]
    flags += SHORT if arguments.short else []
    _, config = parse(flags)
    if config.data.path == "tiny" and config.data.prompts is None:
        data = out.with_name(f"{out.name}_data")
        dataset = preprocess_world(config, data, SHORT_VIDEOS if arguments.short else VIDEOS)
        flags += ["--data.path", str(dataset)]
    cost = train(flags, replace=is_earlier_demo(out, out, (DEMO, SHORT_DEMO)))
    return {**cost, "student_updates": student_updates(config)}


def train(flags: Sequence[str], *, replace: bool) -> dict[str, Any]:
    """Run a training of these flags; returns wall time and peak memory.

    Args:
        replace: delete the contents of the output folder.
    """
    from fastvideo.training.distillation import parse

    launch, config = parse(flags)
    return train_config(config, replace=launch.overwrite or replace)


def train_config(config: Config, *, replace: bool) -> dict[str, Any]:
    """:func:`train` of a config."""
    import torch

    from fastvideo.distillation.engine.optional.performance import peak_memory
    from fastvideo.training.run import run

    begin = time.monotonic()
    run(config, overwrite=replace)
    seconds = time.monotonic() - begin
    return {"wall_seconds": round(seconds, 1), "peak_rss_mb": round(peak_memory(torch.device("cpu")) / 2**20)}


def student_updates(config: Config) -> int:
    """Updates of the student in a run of DMD2 or of a method built on it."""
    return len(range(0, config.trainer.max_steps, config.method.generator_update_interval))


def preprocess_world(config: Config, folder: Path, count: int) -> Path:
    """Write the tiny world as MP4 files and preprocess them; returns the folder of Parquet files."""
    from fastvideo.data.clips import Policy, Size
    from fastvideo.data.model import ModelChoice
    from fastvideo.data.preprocess import make_job, preprocess, summary
    from fastvideo.tiny.video_files import write_world

    videos, out = folder / f"videos-{count}", folder / f"parquet-{count}"
    print(f"writing {count} videos of the tiny world to {videos}")
    write_world(videos, count)
    print(f"fastvideo preprocess {videos} --model {config.model.path} --out {out} --overwrite")
    policy = Policy((Size(config.model.height, config.model.width, config.model.num_frames),))
    choice = ModelChoice(config.distill_model, config.model.model_dump())
    print(summary(out, preprocess(make_job(videos, None, choice, policy, out, 64, "cpu"), workers=1, overwrite=True)))
    return out


def is_earlier_demo(folder: Path, out: Path, usual: Sequence[Path]) -> bool:
    """True if the demo into ``out`` may replace a run in ``folder``: others' runs are refused.

    Args:
        usual: output folders of demos; others are known by their picture.
    """
    return (folder / "config.yaml").is_file() and (out in usual or (out / PICTURE).is_file())


def evaluate(out: Path, prompts: int, training: dict[str, Any]) -> None:
    """Measure teacher, untrained sampler and student on the same prompts and noise; write the page."""
    from fastvideo.data.video_io import write_video
    from fastvideo.evaluation.evaluate import evaluate_rows
    from fastvideo.evaluation.report import write_report
    from fastvideo.evaluation.report_store import save_measured
    from fastvideo.evaluation.rows import comparison_rows
    from fastvideo.inference.loading import load_recipe

    student = str(out / "student")
    teacher = load_recipe(student)["model"]["path"]
    evaluation = evaluate_rows(comparison_rows(teacher, student), prompts=prompts)
    save_measured(out, evaluation, distillation=training)
    write_report([out])
    write_video(out / PICTURE, side_by_side(evaluation.videos), scale=3)


def side_by_side(videos: Mapping[str, Tensor], columns: int = 8) -> Tensor:
    """Tile videos into one ``[3, T, R H, C W]``: a row per model, a column per prompt."""
    import torch

    return torch.cat([torch.cat(list(row[:columns]), dim=-1) for row in videos.values()], dim=-2)


if __name__ == "__main__":
    from fastvideo.entry import report_user_errors

    raise SystemExit(report_user_errors(main))
