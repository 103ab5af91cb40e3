"""Every command of README, docs, recipes and scripts that trains on GPUs fits a card of 80 GB, by its own plan."""

from __future__ import annotations

import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.config.overrides import read_flags
from fastvideo.distillation.config.reading import read_config
from fastvideo.planning.estimate import Planner
from fastvideo.planning.published import without_weights

ROOT = Path(__file__).parents[2]
CARD, RESERVE = 79 * 2**30, 2 * 2**30
SOURCES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*")]
RECIPE = r"wan2\.1_\w+?_[\d.]+b_[a-z0-9_]+"
LAUNCH = re.compile(rf"(?:torchrun|fastvideo plan|fastvideo distill|sbatch) .*?{RECIPE}.*")
TRAINED = "wan2.1-t2v-1.3b"
"""Architecture of models that another recipe trains first."""
PER_RUN = (
    *("--out", "--flops", "--attention-flops", "--bandwidth", "--gpu-memory", "--reserve"),
    *("--nproc-per-node", "--nnodes", "--gpus"),
)
Command = tuple[str, int, tuple[str, ...]]
"""Recipe, processes and overrides of its config."""


def command(line: str) -> Command:
    """A command line as what it asks for."""
    words = shlex.split(line, comments=True)
    value = dict(pairwise(words))
    recipe = next(word for word in words if re.search(RECIPE, word)).removesuffix(".yaml")
    world = int(value.get("--gpus", value.get("--nproc-per-node", "8" if words[0] == "sbatch" else "1")))
    flags = [i for i, word in enumerate(words) if word.startswith("--") and "." in word and word not in PER_RUN]
    overrides = [part for i in flags for part in words[i : i + 2]]
    return Path(recipe).name, world * int(value.get("--nnodes", "1")), tuple(overrides)


def commands() -> list[Command]:
    """All of them, each once."""
    found = set()
    for file in SOURCES:
        if file.suffix in {".md", ".yaml", ".sh", ".sbatch"}:
            text = re.sub(r"\\\n#?\s*", "", file.read_text(encoding="utf-8"))
            for line in text.splitlines():
                bare = line.lstrip("# ").removeprefix("Command: ")
                if LAUNCH.match(bare):
                    found.add(command(bare))
    return sorted(found)


@cache
def planner() -> Planner:
    return Planner()


def test_commands_are_found() -> None:
    found = commands()
    assert {recipe for recipe, _, _ in found} == {p.stem for p in (ROOT / "examples/distillation").glob("wan2.1*.yaml")}
    assert ("wan2.1_t2v_14b_dmd2", 64, ()) in found
    assert ("wan2.1_t2v_1.3b_dmd2", 8, ()) in found


LONG = ("causvid", "self_forcing", "streaming_tuning")
"""Recipes of many calls a step, whose plans take half a minute and more."""


def marked(recipe: str, world: int, flags: tuple[str, ...]) -> Any:
    """A case for the run that has the time for it."""
    return pytest.param(recipe, world, flags, marks=pytest.mark.nightly if recipe.endswith(LONG) else pytest.mark.slow)


@pytest.mark.parametrize(("recipe", "world", "flags"), [marked(*each) for each in commands()], ids=str)
def test_a_command_fits_its_plan(recipe: str, world: int, flags: tuple[str, ...]) -> None:
    config = without_weights(read_config(Path(recipe), read_flags(list(flags))), TRAINED)
    plan = planner().plan(config, world)
    assert plan.total + RESERVE <= CARD, plan
