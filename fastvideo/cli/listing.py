"""``fastvideo list``: methods and model families, the needs of each method, and the pairs that go together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvideo.cli.arguments import parse
from fastvideo.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table


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

    table = Table("method", "what it does", "arXiv", "trained roles", "frozen roles", title="methods")
    for name in METHODS:
        method = load_method(name)
        what, paper = split_paper(method.summary)
        frozen = [*method.frozen_roles, *(f"{role} (optional)" for role in method.optional_roles)]
        table.add_row(name, what, paper, ", ".join(method.trainable_roles), ", ".join(frozen) or "-")
    return table


def combination_table() -> Table:
    """One row per method: its default needs, and for every family `yes` or the needs that it lacks."""
    from rich.table import Column, Table

    from fastvideo.distillation.builder import lacks
    from fastvideo.distillation.registry import ADAPTERS, METHODS, load_adapter, load_method

    names = Column("method", min_width=max(map(len, METHODS)))
    table = Table(names, "data", "needs of the family", *ADAPTERS, title="what goes together")
    for name in METHODS:
        method = load_method(name)
        config = method.Config()
        stored = "stored trajectories" if method.needs_trajectories else "videos"
        data = stored if method.uses_latents(config) else "prompts suffice"
        lacking = [lacks(config, method, load_adapter(family)) for family in ADAPTERS]
        cells = [f"no {', '.join(missing)}" if missing else "yes" for missing in lacking]
        table.add_row(name, data, ", ".join(sorted(method.needs_of(config))) or "-", *cells)
    return table


def family_table() -> Table:
    """One row per registered model family."""
    from rich.table import Table

    from fastvideo.distillation.registry import ADAPTERS, load_adapter

    table = Table("family", "what it is", title="model families")
    for name in ADAPTERS:
        table.add_row(name, load_adapter(name).summary)
    return table


def main(argv: Sequence[str]) -> int:
    """Print the tables; returns the exit code."""
    parse(ListArguments, argv, "list")

    out = console(160)
    for table in (method_table(), family_table(), combination_table()):
        out.print(table)
    out.print("Name a pair in a config (distill_method, distill_model), or with the flags of the same names.")
    out.print("A need of jvp goes away with method.jvp: central_difference.")
    return 0
