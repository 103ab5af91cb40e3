"""``fastvideo evaluate``: a row per folder, a table on the terminal, figures as JSON; or the search for a guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastvideo.distillation.types import UserError
from fastvideo.evaluation.cli import EvaluateArguments
from fastvideo.evaluation.evaluate import Evaluation, evaluate_rows, sample, warm_up
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.metrics import Row
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.report_run import read_run
from fastvideo.evaluation.report_store import check_unmeasured, save_measured, write_json
from fastvideo.evaluation.rows import RowSpec
from fastvideo.evaluation.statistics import Estimate
from fastvideo.inference.loading import load_model
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import BATCH_SIZE

WIDTH_IN_PIPE = 120
KEPT_VIDEOS = 12
"""Videos per model that a folder keeps; the page shows the first of them."""


def run_evaluate(arguments: EvaluateArguments, console: Console | None = None) -> None:
    """Measure the folders, print the table and write ``arguments.out``.

    Raises:
        UserError: for a bad folder or sampler, or an ``out`` that holds figures; nothing is sampled or written then.
    """
    console = console or _console()
    if not arguments.folders:
        raise UserError("evaluate: give at least one model folder, or `tiny`")
    if arguments.sweep_guidance is not None:
        run_sweep(arguments, console)
        return
    rows = row_specs(arguments.folders, arguments.guidance, arguments.ladder)
    alone = arguments.out is not None and arguments.out.suffix == ".json"
    if arguments.out is not None and not alone:
        check_unmeasured(arguments.out)
    evaluation = evaluate_rows(
        rows,
        prompts=arguments.prompts,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        keep_videos=1 if alone or arguments.out is None else KEPT_VIDEOS,
        device=arguments.device,
    )
    console.print(table(evaluation.rows))
    if arguments.out is not None:
        console.print(write_out(arguments.out, evaluation), highlight=False)


def _console() -> Console:
    """Standard output; a file or a pipe has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_IN_PIPE)


def row_specs(
    folders: Sequence[str], guidance: float | None = None, ladder: tuple[float, ...] = ()
) -> dict[str, RowSpec]:
    """A row for each ``FOLDER`` or ``FOLDER:STEPS``, named as given; ``ladder`` for all of them if there is one.

    Raises:
        UserError: if what follows the colon is not a number, comes beside a ladder, or a row is given twice.
    """
    rows: dict[str, RowSpec] = {}
    for text in folders:
        folder, colon, steps = text.rpartition(":")
        if colon and not steps.isdigit():
            raise UserError(f"{text!r}: FOLDER or FOLDER:STEPS is expected, and {steps!r} is not a number of steps")
        if text in rows:
            raise UserError(f"{text!r} is given twice")
        if colon and ladder:
            raise UserError(f"{text!r}: --ladder says how many steps there are; leave out the colon")
        one = RowSpec(folder, int(steps), guidance) if colon else RowSpec(text, guidance=guidance)
        rows[text] = replace(one, ladder=ladder) if ladder else one
    return rows


def write_out(out: Path, evaluation: Evaluation) -> str:
    """The figures alone into a ``.json`` file; into a folder also the first videos and the page. What was written."""
    if out.suffix == ".json":
        write_json(out, evaluation.to_dict())
        return f"figures: {out}"
    save_measured(out, evaluation)
    return f"page: {write_report(out / 'report.html', read_run(out))}"


def table(rows: Mapping[str, Row]) -> Table:
    """All rows with their intervals."""
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
    """``value`` and below it ``low-high``."""
    return f"{figure.value:.{digits}f}\n[dim]{figure.low:.{digits}f}-{figure.high:.{digits}f}[/dim]"


def run_sweep(arguments: EvaluateArguments, console: Console) -> None:
    """Print the distance at each guidance scale, for each folder.

    Raises:
        UserError: if the scales are not numbers.
    """
    try:
        scales = [float(scale) for scale in (arguments.sweep_guidance or "").split(",")]
    except ValueError as error:
        raise UserError(f"--sweep-guidance takes numbers such as 1,1.25,1.5,2: {error}") from error
    for name, spec in row_specs(arguments.folders).items():
        found = sweep_guidance(
            spec,
            scales,
            prompts=arguments.prompts,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
        best = min(found, key=lambda scale: found[scale].value)
        title = f"{name}: {arguments.prompts} training prompts"
        out = Table("guidance", "Frechet", title=title, min_width=len(title) + 4)
        for scale, figure in found.items():
            out.add_row(f"{scale:g}", shown(figure, 2), style="bold" if scale == best else None)
        console.print(out)


def sweep_guidance(
    spec: RowSpec,
    scales: Sequence[float],
    *,
    prompts: int = 512,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
) -> dict[float, Estimate]:
    """Frechet distance at each guidance scale, on training prompts against training videos.

    The choice of a scale so made has seen neither the prompts nor the reference videos of any reported figure.
    """
    model = load_model(spec.folder, device=device)
    judge = Judge(prompts, seed, split="train")
    warm_up(model, judge.prompts)
    frames = judge.first_frames(model.adapter.conditioner)
    found: dict[float, Estimate] = {}
    for scale in scales:
        sampler = replace(spec, guidance=scale).sampler(model)
        with PatientBar(f"guidance {scale:g}", len(judge.prompts) * (sampler.network_calls + 2)) as bar:
            sampled = sample(model, sampler, judge, judge.prompts, seed, batch_size, 0, bar, frames=frames)
        found[scale] = judge.distances(sampled.seen)[0]
    return found
