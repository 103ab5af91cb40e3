"""``fastvideo average``: make averages of a run's student after the run, and choose among them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastvideo.cli.arguments import INT, OptionalPath, OptionalSteps, Switch, parse
from fastvideo.cli.console import console
from fastvideo.errors import UserError
from fastvideo.ranges import PositiveInt, RelativeDeviation, Seed
from fastvideo.sampling_ranges import BatchSize, Samples

if TYPE_CHECKING:
    from rich.table import Table

    from fastvideo.evaluation.averages import Measured
    from fastvideo.inference.averages import Snapshotted

PROMPTS = 512
"""Training prompts unless said otherwise."""
MEASURING = ("steps", "prompts", "seed", "batch_size")
"""Arguments that --choose alone reads."""


@dataclass(frozen=True)
class AverageArguments:
    """Average the student of a run with `ema.post_hoc` anew: one width (--std), or the best of several (--choose)."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder, finished or not."""
    std: Annotated[tuple[RelativeDeviation, ...], tyro.conf.arg(metavar="FLOAT...", help_behavior_hint="")] = ()
    """Widths of the averages to write, relative to the run's length: .05 is over about the last tenth. Each is written
    to averaged-STD in the run's folder. With --choose: those to choose from."""
    choose: Switch = False
    """Measure averages on training prompts of the tiny world, and write the best to averaged in the run's folder."""
    steps: OptionalSteps = None
    """Steps of the sampler by which --choose decides: all of the ladder (the default) or 1."""
    update: Annotated[PositiveInt | None, INT] = None
    """Update of the student for which the average is made, one with a snapshot. Default: the last one."""
    prompts: Annotated[Samples | None, INT] = None
    """Training prompts for --choose. Default: 512."""
    seed: Annotated[Seed | None, INT] = None
    """Seed of prompts and noise for --choose. Default: 0."""
    batch_size: Annotated[BatchSize | None, INT] = None
    """Videos that are denoised together for --choose. Default: 64."""
    out: OptionalPath = None
    """Folder of the result; must be new or empty."""
    overwrite: Switch = False
    """Replace an earlier average in that folder."""


def main(argv: Sequence[str]) -> int:
    """Average; returns the exit code."""
    arguments = parse(AverageArguments, argv, "average")
    if not arguments.std and not arguments.choose:
        raise UserError("average: give --std with one or more widths, such as --std 0.08, or --choose")
    if not arguments.choose:
        _check_nothing_to_measure(arguments)

    from fastvideo.inference.averages import find_snapshots, write_averages

    run = find_snapshots(arguments.run, arguments.update)
    if arguments.choose:
        choose(run, arguments)
        return 0
    for line in write_averages(run, arguments.std, arguments.out, arguments.overwrite):
        print(line)
    return 0


def _check_nothing_to_measure(arguments: AverageArguments) -> None:
    """Refuse what only --choose reads, so that no one takes it for a property of the average."""
    for flag in MEASURING:
        if vars(arguments)[flag] is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} is for --choose, which measures averages; --std alone writes them "
                f"unmeasured: leave it out, or add --choose"
            )


def choose(run: Snapshotted, arguments: AverageArguments) -> None:
    """Measure, print the table, and write the best.

    Raises:
        UserError: for a model that no judge knows, steps that its students do not have, or a folder in use.
    """
    from fastvideo.evaluation.averages import OWN, measure_averages
    from fastvideo.evaluation.measuring import measuring_command
    from fastvideo.inference.averages import RESULT, beside, check_fit, check_free, write_averages
    from fastvideo.inference.loading import load_recipe
    from fastvideo.inference.sampler import BATCH_SIZE

    out = arguments.out or beside(run, RESULT)
    check_free(out, arguments.overwrite)
    for std in arguments.std:
        check_fit(run, std)
    size, stds, prompts = arguments.batch_size or BATCH_SIZE, arguments.std or run.widths, arguments.prompts or PROMPTS
    seed = arguments.seed or 0
    measured = measure_averages(run, stds, steps=arguments.steps, prompts=prompts, seed=seed, batch_size=size)
    rows = list(measured)
    steps = arguments.steps or max(rows[0].frechet)
    best = min((row for row in rows if row.std is not None), key=lambda row: row.frechet[steps].value)
    assert best.std is not None
    title = f"{run.folder.parent}, update {run.update}: {prompts} training prompts"
    console().print(table(rows, best, title))
    print(*write_averages(run, [best.std], out, arguments.overwrite), sep="\n")
    own = [row for row in rows if row.std is None]
    if own and own[0].frechet[steps].value <= best.frechet[steps].value:
        print(f"the run's own result, {beside(run, OWN)}, is as good")
    command = measuring_command(shlex.quote(str(out)), load_recipe(str(out)).get("model", {}))
    print(f"figures to report, on held-out prompts: {command}")


def table(rows: Sequence[Measured], best: Measured, title: str) -> Table:
    """All rows, the best one bold."""
    from rich.table import Table

    out = Table(title=title, min_width=len(title) + 4)
    steps = list(rows[0].frechet)
    for heading in ("std", "error", *(f"Frechet, {n}" for n in steps), *(f"digit, {n}" for n in steps)):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            f"own ({row.weights})" if row.std is None else f"{row.std:g}",
            "" if row.std is None else f"{row.error:.1%}",
            *(f"{f.value:.2f} [dim]{f.low:.2f}-{f.high:.2f}[/dim]" for f in row.frechet.values()),
            *(f"{f.value:.3f}" for f in row.digit.values()),
            style="bold" if row is best else None,
        )
    return out
