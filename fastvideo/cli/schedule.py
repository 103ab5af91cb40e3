"""``fastvideo schedule show CONFIG``: the noise levels of a run, in every common unit.

``fastvideo schedule stock CONFIG`` prints the nearest ladder that stock diffusers can sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastvideo.cli.arguments import OptionalSteps, parse
from fastvideo.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from fastvideo.distillation.builder import Config


@dataclass(frozen=True)
class ScheduleArguments:
    """Show a config's noise levels: the network's real input.

    `t` is the share of noise (1 = pure noise): the clean video is scaled by alpha = 1 - t, the noise by sigma = t.
    """

    action: Annotated[Literal["show", "stock"], tyro.conf.Positional]
    """show: a table of the noise levels. stock: the nearest ladder that stock diffusers samples exactly, as YAML."""
    config: Annotated[Path, tyro.conf.Positional]
    """A run's YAML file, such as the config.yaml that a run saved, or a recipe's name."""
    steps: OptionalSteps = None
    """With stock: the number of steps, instead of those of the config's ladder."""


def published_steps(ladder: object) -> list[float] | None:
    """Timesteps before any shift, as written in a config's ``ladder`` section; ``None`` for another form."""
    if not isinstance(ladder, Mapping):
        return None
    if "steps" in ladder:
        steps = [float(step) for step in ladder["steps"]]
        return steps[:-1] if steps[-1] == 0 else steps
    if "count" in ladder:
        return [1000 * (1 - i / int(ladder["count"])) for i in range(int(ladder["count"]))]
    return None


def schedule_table(config: Config, written: object) -> Table:
    """One row per network call of ``config``; ``written`` is its ladder section as it stands in the file."""
    import torch
    from rich.table import Table

    from fastvideo.distillation.interpolant import Interpolant
    from fastvideo.distillation.registry import load_adapter, load_method

    times = torch.tensor(config.ladder.times, dtype=torch.float64)
    flow = Interpolant.rectified_flow(times)
    columns = [times, flow.sigma, flow.alpha, (flow.alpha / flow.sigma) ** 2]
    network = load_adapter(config.distill_model).network_time(times, config.model)
    sampler = load_method(config.distill_method).sampler
    table = Table(
        title=f"{config.distill_model} x {config.distill_method}: {len(times)} network calls, sampler {sampler}",
        caption=f"ladder as written: {_written(written)}",
    )
    for heading in ("step", "step as written", "t", "sigma", "alpha", "SNR", f"time input of {config.distill_model}"):
        table.add_column(heading, justify="right")
    steps = published_steps(written) or []
    labels = [f"{step:g}" for step in steps] or ["-"] * len(times)
    rows = zip(labels, *(column.tolist() for column in columns), network.tolist(), strict=True)
    for number, (label, *values, given) in enumerate(rows):
        table.add_row(str(number), label, *(f"{value:.4f}" for value in values), f"{given:.3f}")
    return table


def stock_ladder(config: Config, steps: int | None) -> str:
    """YAML of the ladder that a stock scheduler samples exactly.

    Raises:
        UserError: for a family without a diffusers pipeline, or steps that its schedulers cannot take.
    """
    from fastvideo.distillation.grids import uniform_ladder
    from fastvideo.distillation.registry import load_exporter, load_method

    wanted = config.ladder.times if steps is None else uniform_ladder(steps).times
    sampler = load_exporter(config.model).stock_sampler(wanted, load_method(config.distill_method).sampler)
    return f"ladder:  # {type(sampler.scheduler).__name__}\n  times: {list(sampler.times)}"


def _written(ladder: object) -> str:
    if not isinstance(ladder, Mapping):
        return "none, so the default"
    parts = {key: f"{len(value)} values" if key == "times" else value for key, value in ladder.items()}
    return ", ".join(f"{key} {value}" for key, value in parts.items())


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    arguments = parse(ScheduleArguments, argv, "schedule")

    from fastvideo.distillation.config.reading import config_of, read_yaml
    from fastvideo.distillation.config.recipes import find_config

    file = find_config(arguments.config)
    values = read_yaml(file)
    config = config_of(values, str(file))
    if arguments.action == "stock":
        print(stock_ladder(config, arguments.steps))
        return 0
    console().print(schedule_table(config, values.get("ladder")))
    return 0
