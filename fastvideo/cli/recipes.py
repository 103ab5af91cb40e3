"""``fastvideo recipes``: list the ready configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.cli.arguments import parse
from fastvideo.cli.console import console
from fastvideo.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

SMALL = 128
"""Pixels of height below which a CPU trains in minutes."""


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: method, family, hardware and purpose of each."""


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parse(RecipesArguments, argv, "recipes")
    out = console(160)
    out.print(recipe_table())
    out.print("Run one by its name:  fastvideo distill --config NAME", highlight=False)
    return 0


def recipe_table() -> Table:
    """One row per recipe."""
    from rich.table import Table

    from fastvideo.distillation.config.reading import read_yaml
    from fastvideo.distillation.config.recipes import recipes

    table = Table("name", "method", "family", "hardware", "what it is")
    for name, file in recipes().items():
        values = read_yaml(file)
        table.add_row(name, values["distill_method"], values["distill_model"], hardware(values), first_comment(file))
    return table


def hardware(values: Mapping[str, Any]) -> str:
    """The smallest machine for a recipe; videos of the embedded worlds are small enough for a CPU."""
    if values["model"].get("height", 0) < SMALL:
        return "CPU"
    parallel = values.get("parallel", {})
    gpus = parallel.get("shard", 1) * parallel.get("context", 1)
    return f"from {counted(gpus, 'GPU')}"


def first_comment(file: Path) -> str:
    """First sentence of a recipe's leading comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
