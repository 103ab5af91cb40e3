"""``fastvideo export``: write a student as a folder that other programs sample."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvideo.cli.arguments import OptionalPrecision, OptionalSteps, Switch, parse

WhichWeights = tyro.conf.create_mutex_group(required=False, title="weights")
KindSwitch = Annotated[bool, tyro.conf.FlagCreatePairsOff, WhichWeights]


@dataclass(frozen=True)
class ExportArguments:
    """Write a student for other programs, with its sampler: the newest weights of a run, or a model folder."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder (finished or not), or the student's folder in it."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the model; must be new or empty."""
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT", aliases=("--format",))] = "diffusers"
    """Format: `diffusers`, a pipeline folder whose scheduler takes the student's ladder, or `comfy`, the network in one
    file under its authors' names; for a student that streams `fastvideo` (a folder for FastVideo and SGLang) or
    `self-forcing` (one file for Self-Forcing's code); for one that was trained as an adapter also that adapter alone:
    `lora-diffusers`, `lora-peft`, `lora-kohya`, `lora-comfy`, `lora-lightx2v`."""
    steps: OptionalSteps = None
    """Network steps of the scheduler: all of the ladder (the default) or 1."""
    ema: KindSwitch = False
    """The averaged weights: the default, if the run keeps them; refused if it does not."""
    live: KindSwitch = False
    """The weights of the last step."""
    dtype: OptionalPrecision = None
    """Precision of the network's weights in the file. Default: as trained."""
    slim: Switch = False
    """Link text encoder and VAE to the base model's folder instead of storing them again (23 GB for Wan2.1)."""
    overwrite: Switch = False
    """Replace an earlier export in that folder."""

    @property
    def weights(self) -> Literal["ema", "live"] | None:
        """The kind that a flag names."""
        return "ema" if self.ema else "live" if self.live else None


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit code."""
    arguments = parse(ExportArguments, argv, "export")

    from fastvideo.inference.export import run_export

    options = {name: value for name, value in vars(arguments).items() if name not in ("source", "out", "ema", "live")}
    export = run_export(arguments.source, arguments.out, weights=arguments.weights, **options)
    print(export.summary)
    for warning in export.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0
