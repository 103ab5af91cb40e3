"""``fastvideo list``: methods and model families, and what each method needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from rich.table import Table

WIDTH_IN_PIPE = 120
"""Columns of a table that goes to a file or a pipe; a terminal has its own width."""


@dataclass(frozen=True)
class ListArguments:
    """List the methods and the model families; any method runs on any family."""


def split_paper(summary: str) -> tuple[str, str]:
    """A summary without its paper, and the paper's arXiv number or ``-``."""
    found = re.search(r"\s*\(arXiv (\d{4}\.\d{4,5})\)", summary)
    if found is None:
        return summary, "-"
    return summary.replace(found.group(0), ""), found.group(1)


def method_table() -> Table:
    """One row per registered method."""
    from rich.table import Table

    from fastvideo.distillation.builder import METHODS, load_method

    table = Table("method", "what it does", "arXiv", "trained roles", "frozen roles", "data", title="methods")
    for name in METHODS:
        method = load_method(name)
        what, paper = split_paper(method.summary)
        data = "videos" if method.uses_latents(method.Config()) else "prompts suffice"
        table.add_row(name, what, paper, ", ".join(method.trainable_roles), ", ".join(method.frozen_roles) or "-", data)
    return table


def family_table() -> Table:
    """One row per registered model family."""
    from rich.table import Table

    from fastvideo.distillation.builder import ADAPTERS, load_adapter

    table = Table("family", "what it is", title="model families")
    for name in ADAPTERS:
        table.add_row(name, load_adapter(name).summary)
    return table


def main(argv: Sequence[str]) -> int:
    """Print both tables; the exit code."""
    tyro.cli(ListArguments, args=list(argv), prog="fastvideo list")

    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH_IN_PIPE)
    console.print(method_table())
    console.print(family_table())
    console.print("Any method runs on any family: distill_method and distill_model in a config, or the flags.")
    return 0
