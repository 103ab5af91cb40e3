"""``fastvideo precompute-trajectories``: store a teacher's trajectories once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastvideo.cli.arguments import OptionalPlace, Switch, parse
from fastvideo.ranges import BatchSize, PositiveInt, Workers


@dataclass(frozen=True)
class TrajectoryArguments:
    """Sample a teacher from noise to data once, and store its states at the student's noise levels, to train kd on.

    The same call again continues an interrupted one. Ladder, teacher and guidance are the config's: a run with other
    ones refuses the result.
    """

    config: Path
    """The YAML file, or the recipe, of the run that will train on them; its method is kd."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the Parquet files; the run's data.path."""
    prompts: OptionalPlace = None
    """Text file, one prompt per line. Default: captions of the embedded tiny world."""
    count: PositiveInt = 4096
    """Number of trajectories; fewer prompts are repeated."""
    workers: Workers = 1
    """Processes, each with one thread; the rows do not depend on their number."""
    rows_per_file: PositiveInt = 256
    """Trajectories per Parquet file; an interruption loses at most this many per process."""
    batch_size: BatchSize = 32
    """Trajectories that go through the network together."""
    device: str = "cpu"
    """Device: cpu, or cuda (the processes share all GPUs)."""
    overwrite: Switch = False
    """Delete the results of an earlier call in the folder."""


def main(argv: Sequence[str]) -> int:
    """Precompute; returns the exit code."""
    arguments = parse(TrajectoryArguments, argv, "precompute-trajectories")

    from fastvideo.data.trajectories import precompute
    from fastvideo.distillation.config.reading import read_config

    config = read_config(arguments.config)
    captions = _captions(arguments.prompts, arguments.count, config)
    options = {"per_file": arguments.rows_per_file}
    options |= {name: getattr(arguments, name) for name in ("workers", "batch_size", "device", "overwrite")}
    print(precompute(config, captions, arguments.out, options))
    return 0


def _captions(prompts: str | None, count: int, config: Any) -> list[str]:
    if prompts is not None:
        from fastvideo.data.prompts import read_prompts

        read = read_prompts(prompts)
        return [read[i % len(read)] for i in range(count)]
    from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
    from fastvideo.errors import UserError
    from fastvideo.tiny.world import TinyWorld

    if config.model.path not in EMBEDDED:
        raise UserError("--prompts: give a text file with one prompt per line; only the tiny world has captions")
    return list(TinyWorld("train").sample_captions(count, config.seed))
