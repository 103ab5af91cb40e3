"""``fastvideo plan``: predict the needs of a run before it starts, without weights or GPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastvideo.cli.arguments import FLOAT, Switch, check_ranges
from fastvideo.cli.console import patience
from fastvideo.errors import UserError
from fastvideo.ranges import Flops, Processes
from fastvideo.sampling_ranges import Bytes
from fastvideo.wording import counted


@dataclass(frozen=True)
class PlanArguments:
    """Predict what every process of a run holds, computes and sends; exit code 1 if it does not fit.

    Fields of the config can be overridden as for `fastvideo distill`: `--parallel.shard 8`.
    """

    config: Path
    """The run's YAML file, or a recipe's name."""
    gpus: Processes = 1
    """Processes, one per device."""
    gpu_memory: str = "79GiB"
    """Memory of one device as nvidia-smi prints its total: 79GiB for a card of 80 GB."""
    reserve: str = "2GiB"
    """Memory left free for the driver, communication and fragmentation, which are not predicted."""
    architecture: str | None = None
    """Published architecture for a model path that is neither a folder nor a known hub id."""
    flops: Annotated[Flops | None, FLOAT] = None
    """FLOP/s that one device reaches, for an estimate of the time (about 4e14 on an H100 in bfloat16)."""
    attention_flops: Annotated[Flops | None, FLOAT] = None
    """FLOP/s of attention by the config's backend, which `--flops` then leaves out. On an H200: 5.4e14 with `native` or
    `_native_cudnn`, 3.2e14 with `_native_flash`, 1.4e14 with `_native_efficient`, each beside `--flops 2.4e14`."""
    bandwidth: Bytes = 1e11
    """Bytes per second that one device sends."""
    elsewhere: Switch = False
    """Plan for another machine: do not look for the data of the config on this one."""
    calibrate: Switch = False
    """Measure this machine's FLOP/s for four seconds, and those of the config's attention backend, instead of both."""


def read_bytes(text: str, flag: str) -> int:
    """Parse ``80GiB`` to bytes.

    Raises:
        UserError: for a text that is no size.
    """
    from fastvideo.planning.report import UNITS

    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{0,9})?|\.\d{1,9})\s*([A-Za-z]*)\s*", text, re.ASCII)
    if found is None or found[2].upper() not in UNITS:
        raise UserError(f"{flag} {text!r} is no size: 80GiB or 24GB is expected")
    return int(float(found[1]) * UNITS[found[2].upper()])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns 0 if the run fits, else 1."""
    options, rest = tyro.cli(PlanArguments, args=argv, prog="fastvideo plan", return_unknown_args=True)
    check_ranges(options)
    if options.attention_flops and not options.flops:
        raise UserError("--attention-flops is the rate of attention alone: give --flops for the rest, or --calibrate")
    budget, reserve = read_bytes(options.gpu_memory, "--gpu-memory"), read_bytes(options.reserve, "--reserve")

    from fastvideo.distillation.config.overrides import read_flags
    from fastvideo.distillation.config.reading import read_config
    from fastvideo.planning.advice import advise, enough_gpus
    from fastvideo.planning.data import check_there
    from fastvideo.planning.estimate import Planner
    from fastvideo.planning.published import without_weights
    from fastvideo.planning.rates import Rates, measured_rates
    from fastvideo.planning.report import advice_lines, step_lines, table, verdict

    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of kernels that never run
    written = read_config(options.config, read_flags(rest))
    if not options.elsewhere:
        check_there(written.data)
    planner = Planner()
    with patience("predicting; half a minute for a model of 1.3 billion parameters"):
        config = without_weights(written, options.architecture)
        rates = None
        if options.calibrate:
            rates = measured_rates(config, dict(written.model).get("attention_backend"), options.bandwidth)
        elif options.flops:
            rates = Rates(options.flops, options.attention_flops or options.flops, options.bandwidth)
        plan = planner.plan(config, options.gpus)
    parallel = plan.config.parallel
    print(
        f"{options.config}: {written.distill_model} x {written.distill_method} on {counted(plan.world, 'process')} "
        f"(shard {parallel.shard}, copies {plan.world // parallel.shard}, context {parallel.context})\n"
    )
    print("\n".join(table(plan)), "", *step_lines(plan, rates), sep="\n")
    print("", verdict(plan, budget, reserve), sep="\n")
    room = budget - reserve
    if plan.total <= room:
        return 0
    with patience("looking for what would fit"):
        advice = list(advise(planner, plan, room))
    last = advice[-1].plan if advice else plan
    fits = last.total <= room
    print("\n".join(advice_lines(advice, fits, None if fits else enough_gpus(planner, last, room))))
    return 1
