"""``fastvideo precompute-trajectories``: store a teacher's trajectories once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastvideo.cli.arguments import OptionalPlace, Switch, parse
from fastvideo.ranges import PositiveInt
from fastvideo.sampling_ranges import BatchSize, Workers


@dataclass(frozen=True)
class TrajectoryArguments:
    """Sample a teacher from noise to data once, and store its states at the student's noise levels, to train kd on.

    The same call again continues an interrupted one. Ladder, teacher and guidance are the config's: a run with other
    ones refuses the result.
    """

    config: Path
    """The YAML file, or the recipe, of the run that will train on them; its method is kd or causal_kd."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the Parquet files; the run's data.path."""
    prompts: OptionalPlace = None
    """Text file, one prompt per line. Default: captions of the embedded tiny world."""
    causal: Switch = False
    """Let the teacher make each chunk of a video on the clean chunks before it, for causal_kd."""
    data: OptionalPlace = None
    """Videos whose chunks are gone on from with --causal, as data.path of a run takes them; captions come with them.
    Default: the world of the embedded model."""
    count: PositiveInt = 4096
    """Number of trajectories; fewer prompts or videos are repeated."""
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

    from fastvideo.data.trajectories import check_kind, precompute
    from fastvideo.distillation.config.reading import read_config
    from fastvideo.errors import UserError

    config = read_config(arguments.config)
    check_kind(config, "causal" if arguments.causal else "bidirectional")
    videos, captions = None, list[str]()
    if arguments.causal:
        videos, captions = _videos(arguments, config)
    elif arguments.data is not None:
        raise UserError("--data: videos are for --causal; prompts are given with --prompts")
    else:
        captions = _captions(arguments.prompts, arguments.count, config)
    options = {"per_file": arguments.rows_per_file}
    options |= {name: getattr(arguments, name) for name in ("workers", "batch_size", "device", "overwrite")}
    print(precompute(config, captions, arguments.out, options, videos))
    return 0


def _videos(arguments: TrajectoryArguments, config: Any) -> tuple[Any, list[str]]:
    """The videos that chunks go on from, and the caption of each trajectory."""
    from fastvideo.data.order import MemorySource
    from fastvideo.distillation.builder import build_adapter
    from fastvideo.errors import UserError
    from fastvideo.tiny.world import WORLDS
    from fastvideo.training.data import open_videos

    if arguments.prompts is not None:
        raise UserError("--prompts: with --causal captions come with the videos of --data")
    if arguments.data is None and config.model.path not in WORLDS:
        raise UserError("--data: give the videos whose chunks are gone on from; the tiny worlds alone have their own")
    wanted = {"path": arguments.data or config.model.path, "prompts": None, "size": arguments.count, "buckets": False}
    changed = config.model_copy(update={"data": config.data.model_copy(update=wanted)})
    source, _ = open_videos(changed, build_adapter(config))
    captions = source.captions if isinstance(source, MemorySource) else source.captions()
    return source, [captions[i % len(captions)] for i in range(arguments.count)]


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
