"""``fastvideo evaluate``: options, free of heavy imports so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure models of the tiny world: prompt accuracy, distance from real videos, diversity, speed."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...", help_behavior_hint="")]
    """Model folders, or `tiny` or `tiny_cogvideox` for a shipped teacher; FOLDER:STEPS sets the steps, as in
    `tiny:50 out/student:1`."""
    prompts: int = 512
    """Held-out prompts; all models get the same ones, and the same noise."""
    seed: int = 0
    """Chooses prompts and noise."""
    guidance: OptionalFloat = None
    """Guidance scale for all models; default: each model's own."""
    ladder: Annotated[tuple[float, ...], tyro.conf.arg(metavar="TIME...", help_behavior_hint="")] = ()
    """Run students down these times instead of their own, such as `1.0 0.5` for two of the rungs 1, 0.75, 0.5, 0.25.
    Without it a student takes all rungs of its ladder, or the first alone (FOLDER:1)."""
    sweep_guidance: OptionalText = None
    """Compare guidance scales instead, such as 1,1.25,1.5,2, on training prompts that no reported figure uses."""
    out: OptionalPath = None
    """Folder for figures, the first videos and a page, which may be a run's; a name ending in .json: figures alone."""
    batch_size: int = 64
    """Videos that are denoised together; the speed depends on it."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps."""


def main(argv: Sequence[str]) -> int:
    """Evaluate; the exit code."""
    arguments = tyro.cli(EvaluateArguments, args=list(argv), prog="fastvideo evaluate")

    from fastvideo.evaluation.command import run_evaluate

    run_evaluate(arguments)
    return 0
