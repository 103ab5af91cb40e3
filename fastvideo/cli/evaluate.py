"""``fastvideo evaluate``: a row per folder, a table on the terminal, figures as JSON; or the search for a guidance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvideo.cli.arguments import (
    INT,
    OptionalArithmetic,
    OptionalFile,
    OptionalFrames,
    OptionalGuidance,
    OptionalPath,
    OptionalText,
    check_number,
    parse,
)
from fastvideo.cli.console import console as standard_output
from fastvideo.errors import UserError
from fastvideo.ranges import GuidanceScale, Seed, Steps
from fastvideo.sampling_ranges import ON_SWITCH, BatchSize, HeldOut, OnSwitch, Samples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastvideo.evaluation.evaluate import Evaluation
    from fastvideo.evaluation.metrics import Row
    from fastvideo.evaluation.rows import RowSpec
    from fastvideo.evaluation.statistics import Estimate

PROMPTS, STREAMS = 512, 128
"""Prompts of the tiny world unless said otherwise: of nine frames, and of streams."""
KEPT_VIDEOS = 12
"""Videos per model that a folder keeps; the page shows the first of them."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure models: against their teacher on any prompts (--teacher), or on the tiny world, whose truth is known."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...", help_behavior_hint="")]
    """Model folders, hub ids, or `tiny`, `tiny_cogvideox`, `tiny_stream` or `tiny_soft` for a shipped teacher;
    FOLDER:STEPS sets the steps, as in `tiny:50 out/student:1`."""
    teacher: OptionalText = None
    """The teacher that judges the models, FOLDER or FOLDER:STEPS: distance from its videos, prompts found, motion and
    looks, all relative to its own. Needs --out, which keeps all samples: the same call again continues."""
    long: OptionalFrames = None
    """Stream this many frames of the tiny world without edges, such as 129, and measure what becomes of them: drift,
    seams, exposure bias. For models whose recipe.json has `streaming`."""
    switches: HeldOut = 0
    """With --long, also so many streams whose prompt changes in the middle: frames until it shows, and its price."""
    on_switch: OnSwitch = ON_SWITCH
    """Memory of a stream when its prompt changes: the past read again under the new prompt (recache), as it was (keep),
    its sink and last chunk alone (flush), or nothing (cut)."""
    prompts: Annotated[Samples | str | None, tyro.conf.arg(metavar="FILE|URL|INT", help_behavior_hint="")] = None
    """Text file (or a URL) with a prompt per line, for --teacher; or how many held-out prompts of the tiny world
    (default: 512, with --long 128). All models get the same ones, and the same noise."""
    seed: Seed = 0
    """Seed of prompts and noise."""
    guidance: OptionalGuidance = None
    """Guidance scale for all models but the --teacher; default: each model's own."""
    ladder: Annotated[tuple[float, ...], tyro.conf.arg(metavar="TIME...", help_behavior_hint="")] = ()
    """Run students down these times instead of their own, such as `1.0 0.5` for two of the ladder steps 1, 0.75, 0.5,
    0.25. Without it a student takes all steps of its ladder, or the first alone (FOLDER:1)."""
    sweep_guidance: OptionalText = None
    """Compare guidance scales instead, such as 1,1.25,1.5,2, on training prompts that no reported figure uses."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """With --teacher, what to measure; default: all that need no download. Also clip_score, fvd and vbench_DIMENSION,
    which need weights of others."""
    data: OptionalPath = None
    """With --teacher: your own videos, a folder of files or of preprocessed Parquet, to measure the distance from
    too."""
    clip: OptionalText = None
    """A CLIP model of transformers (folder or hub id), for clip_score."""
    fvd_extractor: OptionalFile = None
    """A TorchScript network, such as i3d_torchscript.pt, for fvd."""
    out: OptionalPath = None
    """Folder (which may be a run's) for figures, the first videos and a page; a name ending in .json: figures alone."""
    batch_size: Annotated[BatchSize | None, INT] = None
    """Videos that are denoised together; the speed and the memory depend on it. Default: 64 small ones, 1 of 81 frames
    at 480x832."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps."""
    precision: OptionalArithmetic = None
    """Precision of all networks, with --teacher; default: each model's own."""
    share: OptionalText = None
    """I/N: sample only the I-th of N shares of the videos into --out and stop, such as one per GPU: 1/8 to 8/8, each
    with its --device. The call without it then measures."""


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code."""
    arguments = parse(EvaluateArguments, argv, "evaluate")
    run_evaluate(arguments)
    return 0


def run_evaluate(arguments: EvaluateArguments, console: Console | None = None) -> None:
    """Measure the folders, print the table and write ``arguments.out``.

    Raises:
        UserError: for a bad folder or sampler, or an ``out`` that holds figures or cannot be written, before anything
            is sampled.
    """
    from fastvideo.evaluation.evaluate import evaluate_rows
    from fastvideo.evaluation.report_store import check_unmeasured
    from fastvideo.inference.sampler import BATCH_SIZE
    from fastvideo.mount import check_writable

    console = console or standard_output()
    if not arguments.folders and arguments.teacher is None:
        raise UserError("evaluate: give at least one model folder, or `tiny`")
    if arguments.out is not None:
        check_writable(arguments.out)
    _check_together(arguments)
    if arguments.sweep_guidance is not None:
        run_sweep(arguments, console)
        return
    if arguments.teacher is not None:
        from fastvideo.cli.against_teacher import run_against_teacher

        run_against_teacher(arguments, console)
        return
    _check_without_teacher(arguments)
    if arguments.long is not None:
        from fastvideo.cli.evaluate_streams import run_streams

        run_streams(arguments, console)
        return
    rows = row_specs(arguments.folders, arguments.guidance, arguments.ladder)
    alone = arguments.out is not None and arguments.out.suffix == ".json"
    if arguments.out is not None and not alone:
        check_unmeasured(arguments.out)
    evaluation = evaluate_rows(
        rows,
        prompts=world_prompts(arguments),
        seed=arguments.seed,
        batch_size=arguments.batch_size or BATCH_SIZE,
        keep_videos=1 if alone or arguments.out is None else KEPT_VIDEOS,
        device=arguments.device,
    )
    console.print(table(evaluation.rows))
    if arguments.out is not None:
        console.print(write_out(arguments.out, evaluation), highlight=False)


def world_prompts(arguments: EvaluateArguments) -> int:
    """The number of the tiny world's prompts.

    Raises:
        UserError: for a prompts file: only a teacher can judge videos of any prompts.
    """
    if arguments.prompts is None:
        return PROMPTS if arguments.long is None else STREAMS
    if isinstance(arguments.prompts, int):
        return arguments.prompts
    raise UserError(
        f"--prompts {arguments.prompts}: without --teacher the tiny world measures its own models on prompts of its "
        f"own; add --teacher FOLDER:STEPS, or give a number of prompts"
    )


def _check_together(arguments: EvaluateArguments) -> None:
    """Refuse options of streams without ``--long``, and ``--long`` beside other measurements."""
    if arguments.long is None:
        if arguments.switches or arguments.on_switch != ON_SWITCH:
            raise UserError("--switches and --on-switch are for streams: add --long FRAMES, such as --long 129")
        return
    for name in ("teacher", "sweep_guidance"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--long measures streams of the tiny world: leave out --{name.replace('_', '-')}")


def _check_without_teacher(arguments: EvaluateArguments) -> None:
    """Refuse options that need a teacher."""
    for name in ("metrics", "data", "clip", "fvd_extractor", "precision", "share"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} needs --teacher FOLDER:STEPS, which judges the models")


def row_specs(
    folders: Sequence[str], guidance: float | None = None, ladder: tuple[float, ...] = ()
) -> dict[str, RowSpec]:
    """Parse a row for each ``FOLDER`` or ``FOLDER:STEPS``, named as given; a ``ladder`` applies to all of them.

    Raises:
        UserError: for steps that are not a number, steps beside a ladder, or a row that is given twice.
    """
    from fastvideo.evaluation.rows import RowSpec

    rows: dict[str, RowSpec] = {}
    for text in folders:
        folder, colon, steps = text.rpartition(":")
        if colon and not re.fullmatch(r"\d{1,9}", steps, re.ASCII):
            raise UserError(f"{text!r}: FOLDER or FOLDER:STEPS is expected, and {steps!r} is not a number of steps")
        if text in rows:
            raise UserError(f"{text!r} is given twice")
        if colon and ladder:
            raise UserError(f"{text!r}: --ladder says how many steps there are; leave out the colon")
        if colon:
            check_number(f"{text!r}: the steps", int(steps), Steps)
        one = RowSpec(folder, int(steps), guidance) if colon else RowSpec(text, guidance=guidance)
        rows[text] = replace(one, ladder=ladder) if ladder else one
    return rows


def write_out(out: Path, evaluation: Evaluation[Any]) -> str:
    """Write figures to a ``.json`` file, or figures, first videos and page to a folder; returns a message."""
    from fastvideo.evaluation.report import write_report
    from fastvideo.evaluation.report_store import save_measured, write_json

    if out.suffix == ".json":
        write_json(out, evaluation.to_dict())
        return f"figures: {out}"
    save_measured(out, evaluation)
    return f"page: {write_report([out])}"


def table(rows: Mapping[str, Row]) -> Table:
    """All rows with their intervals."""
    from rich.table import Table

    first = next(iter(rows.values()))
    floors = f"Frechet {first.frechet_floor:.2f}, pixels {first.frechet_pixel_floor:.0f}"
    out = Table(
        title=f"{first.samples} held-out prompts, 95 % bootstrap intervals",
        caption=f"floor (as many real videos through the VAE): {floors}",
    )
    out.add_column("model", overflow="fold")
    for heading in ("calls", "digit", "colour", "direction", "Frechet", "pixels", "diversity", "s / video"):
        out.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        out.add_row(
            name,
            str(row.network_calls),
            *(shown(e, 3) for e in (row.digit_accuracy, row.colour_accuracy, row.direction_accuracy)),
            shown(row.frechet, 2),
            shown(row.frechet_pixel, 0),
            shown(row.diversity, 2),
            f"{row.denoise_seconds_per_video:.4f}",
        )
    return out


def shown(figure: Estimate, digits: int) -> str:
    """Format ``value``, and below it ``low-high``."""
    return f"{figure.value:.{digits}f}\n[dim]{figure.low:.{digits}f}-{figure.high:.{digits}f}[/dim]"


def run_sweep(arguments: EvaluateArguments, console: Console) -> None:
    """Print the distance at each guidance scale, for each folder.

    Raises:
        UserError: if the scales are not numbers.
    """
    from rich.table import Table

    from fastvideo.evaluation.sweep import sweep_guidance
    from fastvideo.inference.sampler import BATCH_SIZE

    try:
        scales = [float(scale) for scale in (arguments.sweep_guidance or "").split(",")]
    except ValueError as error:
        raise UserError(f"--sweep-guidance takes numbers such as 1,1.25,1.5,2: {error}") from error
    for scale in scales:
        check_number("--sweep-guidance", scale, GuidanceScale)
    for name, spec in row_specs(arguments.folders).items():
        found = sweep_guidance(
            spec,
            scales,
            prompts=world_prompts(arguments),
            seed=arguments.seed,
            batch_size=arguments.batch_size or BATCH_SIZE,
            device=arguments.device,
        )
        best = min(found, key=lambda scale: found[scale].value)
        title = f"{name}: {world_prompts(arguments)} training prompts"
        out = Table("guidance", "Frechet", title=title, min_width=len(title) + 4)
        for scale, figure in found.items():
            out.add_row(f"{scale:g}", shown(figure, 2), style="bold" if scale == best else None)
        console.print(out)
