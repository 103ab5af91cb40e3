"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from fastvideo.files import gib
from fastvideo.planning.advice import Advice
from fastvideo.planning.estimate import Plan
from fastvideo.planning.rates import Rates

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def table(plan: Plan) -> list[str]:
    """Bytes per role and process."""
    rows = [("on each process", "parameters", "weights", "gradients", "optimizer", "average", "together")]
    for role in plan.roles:
        kind = f"{role.name} ({'trained' if role.trainable else 'frozen'})"
        values = (role.weights + role.tables, role.gradients, role.optimizer, role.average, role.total)
        rows.append((kind, f"{role.parameters:,}", *map(gib, values)))
    most = max(plan.activations.values())
    others = {**plan.parts, "buffers of the layout": plan.buffers, "activations": most}
    rows += [(name, "", "", "", "", "", gib(value)) for name, value in others.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def step_lines(plan: Plan, rates: Rates | None) -> list[str]:
    """Memory by kind of loss and of a validation, arithmetic, traffic and, with rates, time of a step."""
    calls = ", ".join(f"{role} {count:.3g}" for role, count in plan.step.calls.items())
    backwards = sum(plan.step.backwards.values())
    lines = [
        "memory beyond what stays from step to step: " + memory_line(plan),
        f"a step, on average: {plan.flops / 1e12:.4g} TFLOP per process, {plan.step.attention:.0%} of it attention; "
        f"forwards per micro-batch: {calls}; backwards {backwards:.3g}",
        f"traffic: each process sends {gib(plan.sent)} per step",
    ]
    if plan.snapshots and (options := plan.config.ema.post_hoc):
        count = len(options.stds) * (options.keep + 1)
        lines.append(f"disk: at most {count} snapshots of the student's averages, {gib(plan.snapshots)} in all")
    if rates:
        lines.append(time_line(plan, rates))
    return lines


def time_line(plan: Plan, rates: Rates) -> str:
    """Seconds of a step: its arithmetic, attention apart if it has a rate of its own, and its traffic."""
    seen = plan.flops * plan.step.attention
    attention, rest, traffic = seen / rates.attention, (plan.flops - seen) / rates.flops, plan.sent / rates.bandwidth
    if rates.attention == rates.flops:
        arithmetic = f"{attention + rest:.3g} s of arithmetic at {rates.flops:.3g} FLOP/s"
    else:
        arithmetic = (
            f"{attention:.3g} s of attention at {rates.attention:.3g} FLOP/s, {rest:.3g} s of other arithmetic at "
            f"{rates.flops:.3g} FLOP/s"
        )
    low, high = max(attention + rest, traffic), attention + rest + traffic
    return (
        f"time: {arithmetic}, {traffic:.3g} s of traffic at {rates.bandwidth:.3g} B/s: {low:.3g} to {high:.3g} s per "
        f"step, as they overlap"
    )


def memory_line(plan: Plan) -> str:
    """The peaks of a step's losses and of a validation, which share one place."""
    gradients = sum(role.gradients for role in plan.roles) + plan.buffers
    peaks = {f"{role}'s loss": kept + gradients for role, kept in plan.activations.items()}
    if plan.validation:
        peaks["a validation"] = plan.validation
    if plan.encoding:
        peaks["encoding prompts before the first step"] = plan.encoding
    return ", ".join(f"{name} {gib(size)}" for name, size in peaks.items())


def verdict(plan: Plan, budget: int, reserve: int) -> str:
    """The last line: the run fits, or does not."""
    need, room = plan.total + reserve, budget
    word = "FITS" if need <= room else "DOES NOT FIT"
    return f"{word}: {gib(plan.total)} + {gib(reserve)} reserve of {gib(room)} per process"


def advice_lines(advice: Sequence[Advice], fits: bool, gpus: int | None) -> list[str]:
    """Changes that help, each on top of the ones before."""
    lines = ["cheapest first, each on top of the ones before:"] if advice else []
    lines += [f"  {step.flags:<50} {gib(step.plan.total):>12}   {step.cost}" for step in advice]
    if fits:
        lines.append("  with these it fits")
    elif gpus is None:
        lines.append("no number of processes makes room: smaller videos, or a smaller batch, are needed")
    else:
        lines.append(f"not enough: it fits on {gpus} such devices with --gpus {gpus} --parallel.shard {gpus}")
    return lines
