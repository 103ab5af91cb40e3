"""``fastvideo merge``: write a model folder with LoRA files merged in, or with the network of a single file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastvideo.cli.arguments import OptionalPrecision, OptionalText, Switch, parse


@dataclass(frozen=True)
class MergeArguments:
    """Merge LoRA files into a model: the folder that comes out trains, samples and loads like any other."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model folder, a hub id, or `tiny`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the model; must be new or empty."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE[:WEIGHT]")] = ()
    """LoRA file of diffusers, peft, kohya (musubi-tuner), ComfyUI or LightX2V, or its folder; repeatable. Weight 1 by
    default."""
    network: OptionalText = None
    """Single file with weights to take instead of the folder's network: the authors' layout, ComfyUI's, or its scaled
    fp8."""
    dtype: OptionalPrecision = None
    """Precision of the network's weights in the folder. Default: as merged, in float32, twice the size of a base in
    bfloat16."""
    overwrite: Switch = False
    """Replace an earlier merge in that folder."""


def main(argv: Sequence[str]) -> int:
    """Merge; returns the exit code."""
    arguments = parse(MergeArguments, argv, "merge")

    from fastvideo.inference.merge import run_merge

    print(run_merge(**vars(arguments)))
    return 0
