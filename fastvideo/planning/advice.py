"""Changes to a run that does not fit, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastvideo.distillation.builder import Config
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.types import UserError
from fastvideo.planning.estimate import Plan, Planner

ENOUGH_GPUS = 1024


@dataclass(frozen=True)
class Advice:
    """Flags to add to what came before, what they cost, and the plan that they give."""

    flags: str
    cost: str
    plan: Plan


def advise(planner: Planner, plan: Plan, budget: int) -> Iterator[Advice]:
    """Changes on top of one another, until the run fits or there are no more."""
    for flags, cost, sections in changes(plan.config, plan.world):
        config = changed(plan.config, sections)
        try:
            better = planner.plan(config, plan.world)
        except UserError:  # a degree that heads or tokens do not allow is no advice
            continue
        if better.total >= plan.total:
            continue
        plan = better
        yield Advice(flags, cost, plan)
        if plan.total <= budget:
            return


Change = tuple[str, str, dict[str, dict[str, object]]]
"""Flags, their cost and the config sections that they set."""


def sharding(parallel: ParallelConfig, world: int) -> Iterator[Change]:
    """Changes to how networks are split."""
    shards = [n for n in range(2, world + 1) if world % n == 0 and n > parallel.shard]
    for shard in shards:
        yield (
            f"--parallel.shard {shard}",
            "traffic: weights are gathered block by block",
            {"parallel": {"shard": shard, "replicate": None}},
        )
    if parallel.keep_gathered != "none":
        yield (
            "--parallel.keep-gathered none",
            "traffic: weights are gathered for every forward",
            {"parallel": {"keep_gathered": "none"}},
        )


def changes(config: Config, world: int) -> Iterator[Change]:
    """All that may help, cheapest first."""
    parallel = config.parallel
    yield from sharding(parallel, world)
    if parallel.activation_checkpointing == "none":
        yield (
            "--parallel.activation-checkpointing full",
            "about 1.2 to 1.3 times the time",
            {"parallel": {"activation_checkpointing": "full"}},
        )
    if config.data.batch_size > 1:
        accumulation = config.data.batch_size * config.trainer.grad_accumulation
        yield (
            f"--data.batch-size 1 --trainer.grad-accumulation {accumulation}",
            "the same batch in more, smaller pieces",
            {"data": {"batch_size": 1}, "trainer": {"grad_accumulation": accumulation}},
        )
    for context in [n for n in (2, 4, 8) if world % n == 0 and n > parallel.context]:
        yield (
            f"--parallel.context {context}",
            f"{context} processes share a sample: the batch per step is {context} times smaller",
            {"parallel": {"context": context}},
        )
    if world > 1:
        yield "--parallel.offload frozen", "frozen weights travel from the host", {"parallel": {"offload": "frozen"}}
    if config.trainer.optimizer_states == "float32" and all(kind == "adamw" for kind in optimizer_kinds(config)):
        yield (
            "--trainer.optimizer-states 8bit",
            "AdamW's moments are rounded; needs the extra eightbit",
            {"trainer": {"optimizer_states": "8bit"}},
        )
    if config.ema.enabled:
        yield (
            "--ema.no-enabled",
            "no average: the result is usually a little worse",
            {"ema": {"enabled": False}},
        )


def optimizer_kinds(config: Config) -> set[str]:
    """The optimizers of the run's roles."""
    return {options.kind for options in load_method(config.distill_method).optimizers(config.method).values()}


def changed(config: Config, sections: dict[str, dict[str, object]]) -> Config:
    """The config with some fields of some sections set."""
    update = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=update)


def enough_gpus(planner: Planner, plan: Plan, budget: int) -> int | None:
    """The smallest doubling of the processes that fits when they all hold one copy; ``None`` for none."""
    world = max(plan.world, 1)
    while world <= ENOUGH_GPUS:
        config = changed(plan.config, {"parallel": {"shard": world, "replicate": None}})
        if planner.plan(config, world).total <= budget:
            return world
        world *= 2
    return None
