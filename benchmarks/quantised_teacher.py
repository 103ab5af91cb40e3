"""The price of a quantised teacher on the tiny world: its own videos, and those of students that it taught.

python benchmarks/quantised_teacher.py --kinds int8 nf4 fp8_storage --train 600

The first table holds the teacher with what each kind leaves of its weights, the second 4-step students of the tiny
recipe, with the same seed and the same number of steps. Prompts are held out, and the same for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from fastvideo.cli import main as fastvideo
from fastvideo.distillation.adapters.diffusers.packed import PACKERS
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.scaling import Quantise

RECIPE = "examples/distillation/tiny_wan_dmd2.yaml"


@dataclass(frozen=True)
class Arguments:
    """Measure what quantising the teacher costs on the tiny world."""

    kinds: tuple[Quantise, ...] = ("int8", "nf4", "fp8_storage")
    """Kinds of quantisation."""
    prompts: int = 512
    """Held-out prompts."""
    steps: int = 25
    """Guided steps of the teachers."""
    train: int = 0
    """Steps of the students' training; 0 measures teachers alone."""
    set: tuple[str, ...] = ()
    """Changes of the students' recipe, such as `method.critic_sees_rung=false`."""
    out: Path = Path("outputs/quantised_teacher")
    """Where folders and figures go."""


def left_of(layer: nn.Linear, kind: Quantise) -> torch.Tensor:
    """A layer's matrix in float32 after its way through a kind of storage."""
    packed: Any = PACKERS[kind](layer)
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        matrix: torch.Tensor = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        return matrix.float()
    return packed.weight.dequantize().float() if kind == "int8" else packed.weight.float()


def teacher_folder(kind: Quantise, out: Path) -> Path:
    """The tiny teacher with what ``kind`` leaves of its weights, as a model folder."""
    folder = out / f"teacher_{kind}"
    if not folder.exists():
        family = WanFamily(WanFamilyConfig())
        network, packed = (family.folder.load_network() for _ in range(2))
        layers = family.scaling.matrices(packed)
        found = {name: left_of(layer, kind) for name, layer in layers.items()}
        with torch.no_grad():
            for name, matrix in found.items():
                network.get_submodule(name).weight.copy_(matrix)  # type: ignore[operator, union-attr]
        family.folder.save(folder, network, dict(family.folder.recipe_of(None)))
    return folder


def student_folder(kind: Quantise | None, arguments: Arguments) -> Path:
    """A student of the tiny recipe, of a teacher in this kind of storage."""
    run = arguments.out / "_".join(("student", kind or "none", str(arguments.train), *arguments.set))
    if not (run / "student").exists():
        flags = ["--config", RECIPE, "--output", str(run), "--trainer.max-steps", str(arguments.train)]
        flags += ["--trainer.threads", "1", "--validation.every", "0", "--overwrite"]
        flags += [part for change in arguments.set for part in f"--{change}".split("=", 1)]
        fastvideo(["distill", *flags, *(["--roles.teacher.quantise", kind] if kind else [])])
    return run / "student"


def main() -> None:
    """Print both tables."""
    arguments = tyro.cli(Arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = ["--prompts", str(arguments.prompts)]
    teachers = [teacher_folder(kind, arguments.out) for kind in arguments.kinds]
    rows = [f"{folder}:{arguments.steps}" for folder in ("tiny", *teachers)]
    fastvideo(["evaluate", *rows, *shared, "--out", str(arguments.out / "teachers.json")])
    if arguments.train:
        students = [str(student_folder(kind, arguments)) for kind in (None, *arguments.kinds)]
        fastvideo(["evaluate", *students, *shared, "--out", str(arguments.out / "students.json")])


if __name__ == "__main__":
    main()
