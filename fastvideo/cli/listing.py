"""``fastvideo list``: methods and model families, the needs of each method, and the pairs that go together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from fastvideo.cli.arguments import parse
from fastvideo.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from fastvideo.distillation.types import Need


@dataclass(frozen=True)
class ListArguments:
    """List the methods, the model families, and the pairs that go together."""


def split_paper(summary: str) -> tuple[str, str]:
    """Split a summary into its text and the arXiv number of its paper, or ``-``."""
    found = re.search(r"\s*\(arXiv (\d{4}\.\d{4,5})\)", summary)
    if found is None:
        return summary, "-"
    return summary.replace(found.group(0), ""), found.group(1)


def method_table() -> Table:
    """One row per registered method."""
    from rich.table import Table

    from fastvideo.distillation.registry import METHODS, load_method

    table = Table("method", "what it does", "arXiv", "trained roles", "frozen roles", "data", title="methods")
    for name in METHODS:
        method = load_method(name)
        what, paper = split_paper(method.summary)
        frozen = [*method.frozen_roles, *(f"{role} (optional)" for role in method.optional_roles)]
        stored = "stored trajectories" if method.needs_trajectories else "videos"
        data = stored if method.uses_latents(method.Config()) else "prompts suffice"
        table.add_row(name, what, paper, ", ".join(method.trainable_roles), ", ".join(frozen) or "-", data)
    return table


def family_table() -> Table:
    """One row per registered model family."""
    from rich.table import Table

    from fastvideo.distillation.registry import ADAPTERS, load_adapter

    table = Table("family", "what it is", "level", title="model families")
    for name in ADAPTERS:
        table.add_row(name, load_adapter(name).summary, load_adapter(name).Config.level)
    return table


def combination_table() -> Table:
    """One row per kind of needs: the methods that have them by default, the families that meet them, and the others."""
    from rich.table import Table

    from fastvideo.distillation.registry import ADAPTERS, METHODS, load_adapter, load_method

    groups: dict[frozenset[Need], list[str]] = {}
    for name in METHODS:
        method = load_method(name)
        groups.setdefault(method.needs_of(method.Config()), []).append(name)
    table = Table("needs of the family", "methods", "families", "families that lack", title="what goes together")
    for needs in sorted(groups, key=lambda needs: (len(needs), sorted(needs))):
        lacking = {name: sorted(needs - load_adapter(name).supports) for name in ADAPTERS}
        fitting = [name for name, missing in lacking.items() if not missing]
        rows = [", ".join(sorted(needs)), ", ".join(groups[needs]), ", ".join(fitting), _lacks(lacking)]
        table.add_row(*(cell or "-" for cell in rows))
    return table


def _lacks(lacking: Mapping[str, Sequence[str]]) -> str:
    """Families under what they lack, a line for each kind."""
    kinds: dict[str, list[str]] = {}
    for name, missing in lacking.items():
        if missing:
            kinds.setdefault(", ".join(missing), []).append(name)
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())


def experts_line() -> str:
    """A line on models of two experts: their level, their methods, and the family's abilities that they lack."""
    from fastvideo.distillation.experts import LEVEL, SUPPORTS
    from fastvideo.distillation.registry import METHODS, load_method
    from fastvideo.distillation.types import Need

    methods = [name for name in METHODS if load_method(name).needs_of(load_method(name).Config()) <= SUPPORTS]
    return (
        f"Models of two experts (Wan 2.2 A14B): level {LEVEL}, methods {', '.join(methods)}; they lack "
        f"{', '.join(sorted({*get_args(Need)} - SUPPORTS))}."
    )


def main(argv: Sequence[str]) -> int:
    """Print the tables; returns the exit code."""
    parse(ListArguments, argv, "list")

    out = console(160)
    for table in (method_table(), family_table(), combination_table()):
        out.print(table)
    out.print("Name a pair in a config (distill_method, distill_model), or with the flags of the same names.")
    out.print(experts_line())
    out.print("A need of jvp goes away with method.jvp: central_difference.")
    return 0
