"""``fastvideo conformance``: check that a model family, or a method, fulfils its contract."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastvideo.cli.arguments import parse
from fastvideo.cli.console import console
from fastvideo.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from fastvideo.conformance.run import Outcome


OF_FAMILIES = ("tiny", "prompts", "device")
"""Arguments that a method has no use for."""


@dataclass(frozen=True)
class ConformanceArguments:
    """Check that a model family fulfils the adapter contract, or a method its own. Exit code 0: it does; 1: a check
    failed; 2: misuse. A method is examined in four steps on roles whose networks are known exactly."""

    examined: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAMILY|METHOD")]
    """A registered family or method, or your class as package.module:Class."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="YAML", help_behavior_hint="")] = None
    """A run's config, or a recipe's name, whose `model` section the adapter is built from (`method`: the method)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint="")] = ()
    """Options over it, such as path=my/folder height=32; of a method, such as student_every=2 time_range=[0.1,0.9]."""
    tiny: bool = False
    """Take the family's tiny pipeline of random weights, which is made on the spot in seconds, without a download. Some
    families have variants: flux2-dev, ltx2-2.3."""
    prompts: tuple[str, str] = ('a green "seven" moving up', "a red three")
    """Two prompts that the text encoder tells apart. Some families read quoted words by another encoder too."""
    device: str = "cpu"
    """Device: cpu, cuda, mps."""


def main(argv: Sequence[str]) -> int:
    """Check; returns the exit code."""
    arguments = parse(ConformanceArguments, argv, "conformance")

    import torch

    from fastvideo.conformance.run import conform, conform_method, find_family, find_method, idle_roles, options_of
    from fastvideo.conformance.tiny import family_of

    name, tiny = arguments.examined, arguments.examined if arguments.tiny else None
    method = find_method(name)
    given = [f"--{key}" for key in OF_FAMILIES if getattr(arguments, key) != getattr(ConformanceArguments, key)]
    if method is not None and given:
        raise UserError(f"{', '.join(given)}: for a family alone; {name!r} is a method")
    small = arguments.tiny or method is not None
    if small and "OMP_NUM_THREADS" not in os.environ:  # at this size more threads wait for each other
        torch.set_num_threads(1)
    begun, section = time.monotonic(), "method" if method else "model"
    options, idle = options_of(section, arguments.config, arguments.set, method), list[str]()
    if method is not None:
        outcomes, idle = conform_method(method, options), idle_roles(method, options)
    else:
        family = find_family(name if tiny is None else family_of(tiny))
        outcomes = conform(family, options, arguments.prompts, arguments.device, tiny)
    seconds = round(time.monotonic() - begun, 2)
    console(160).print(table(outcomes))
    counts = Counter(outcome.result for outcome in outcomes)
    passed, failed, others = counts["passed"], counts["FAILED"], counts["not applicable"]
    print(f"{(method or family).__name__}: {passed} of {passed + failed} checks hold; {others} do not apply")
    for role in idle:
        print(f"{role} was trained in none of the four steps, so its loss was not examined: ", end="")
        print("give shorter intervals with --set")
    names = [outcome.name for outcome in outcomes if outcome.result == "FAILED"]
    figures = {"method" if method else "family": name, "passed": passed, "failed": names, "not_applicable": others}
    figures |= {"untrained": idle} if method else {}
    print(json.dumps({**figures, "seconds": seconds, "threads": torch.get_num_threads()}))
    return 1 if failed else 0


def table(outcomes: Iterable[Outcome]) -> Table:
    """One row per check, with the finding and the place to look at."""
    from rich.table import Table

    styles = {"passed": "green", "FAILED": "bold red", "not applicable": "dim"}
    shown = Table("check", "result", "what was found", "where to look")
    for outcome in outcomes:
        result = f"[{styles[outcome.result]}]{outcome.result}[/]"
        shown.add_row(outcome.name, result, outcome.message, outcome.where)
    return shown
