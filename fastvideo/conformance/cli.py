"""``fastvideo conformance``: options, free of heavy imports so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ConformanceArguments:
    """Check that a model family fulfils the adapter contract. Exit code 0: it does; 1: a check failed; 2: misuse."""

    family: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAMILY")]
    """A registered family, or your class as package.module:Class."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="YAML", help_behavior_hint="")] = None
    """A run's config, whose `model` section the adapter is built from."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint="")] = ()
    """Options of the family over it, such as path=my/folder height=32."""
    prompts: tuple[str, str] = ("a green seven moving up", "a red three")
    """Two prompts that the text encoder tells apart."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""


def main(argv: Sequence[str]) -> int:
    """Check; the exit code."""
    arguments = tyro.cli(ConformanceArguments, args=list(argv), prog="fastvideo conformance")

    from rich.console import Console

    from fastvideo.conformance.run import conform, find_family, model_options, table

    family = find_family(arguments.family)
    options = model_options(arguments.config, arguments.set)
    outcomes = conform(family, options, arguments.prompts, arguments.device)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(outcomes))
    failed = sum(outcome.result == "FAILED" for outcome in outcomes)
    print(f"{family.__name__}: {len(outcomes) - failed} of {len(outcomes)} checks hold")
    return 1 if failed else 0
