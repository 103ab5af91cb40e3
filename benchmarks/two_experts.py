"""A student of two experts, two steps each, against one network of four steps, on the tiny world.

python benchmarks/two_experts.py

The teacher is the shipped one; that of the two experts holds its network twice, so that both students learn the same
and only their number of networks differs. Each expert sees half of the updates: ``--steps`` counts those of the
student of one network, and ``--factor`` says how many more the other takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from fastvideo.evaluation.evaluate import evaluate_rows
from fastvideo.evaluation.metrics import Row
from fastvideo.evaluation.rows import RowSpec
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.training.distillation import parse
from fastvideo.training.run import run

RECIPE = Path("examples/distillation/tiny_wan_dmd2.yaml")
BOUNDARY = 0.625
"""Time between the experts: in the middle of the recipe's second and third step."""
FIGURES = ("digit_accuracy", "colour_accuracy", "direction_accuracy", "frechet", "frechet_pixel")


@dataclass(frozen=True)
class Arguments:
    """Train both students and measure them on the same held-out prompts."""

    methods: tuple[str, ...] = ("dmd2", "phased_dmd")
    """Methods of the student of two experts."""
    steps: int = 2000
    """Training steps of the student of one network."""
    factor: float = 2.0
    """Training steps of the student of two, over those."""
    seed: int = 0
    """Seed of the trainings."""
    prompts: int = 512
    """Held-out prompts."""
    out: Path = Path("outputs/two_experts")
    """Where the runs go; one that has its student is not run again."""


def two_experts(folder: Path) -> Path:
    """Write the shipped teacher with its network twice, one on either side of the boundary; returns the folder."""
    from diffusers import WanPipeline

    if not folder.is_dir():
        pipeline = WanPipeline.from_pretrained(PIPELINE_FOLDER)
        parts = {**pipeline.components, "transformer_2": pipeline.transformer}
        WanPipeline(**parts, boundary_ratio=BOUNDARY).save_pretrained(folder)
    return folder


def recipe(folder: Path) -> Path:
    """Write the tiny recipe without the options that methods of two phases do not have; returns the file."""
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for option in ("rung_shares", "critic_sees_rung"):
        values["method"].pop(option, None)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def trained(method: str, model: str, steps: int, arguments: Arguments) -> Path:
    """The student of a run, which is made if it is not there."""
    out = arguments.out / f"{method}-{Path(model).name}-seed-{arguments.seed}"
    if not (out / "student").is_dir():
        flags = ["--config", str(recipe(arguments.out)), "--output", str(out), "--distill-method", method]
        flags += ["--model.path", model]
        flags += ["--trainer.max-steps", str(steps), "--validation.every", "0", "--trainer.threads", "1"]
        run(parse([*flags, "--seed", str(arguments.seed)])[1], overwrite=True)
    return out / "student"


def figures(row: Row) -> dict[str, float]:
    """The figures of one model that the comparison names."""
    every = row.to_dict()
    return {name: round(every[name], 4) for name in FIGURES}


def main() -> None:
    """Train what is missing, measure, and print one JSON object with the figures of each model."""
    arguments = tyro.cli(Arguments)
    both = str(two_experts(arguments.out / "teacher"))
    rows = {"teacher": RowSpec("tiny", steps=50)}
    rows["one network, dmd2"] = RowSpec(str(trained("dmd2", "tiny", arguments.steps, arguments)))
    for method in arguments.methods:
        student = trained(method, both, round(arguments.factor * arguments.steps), arguments)
        rows[f"two experts, {method}"] = RowSpec(str(student))
    measured = evaluate_rows(rows, prompts=arguments.prompts)
    print(json.dumps({name: figures(row) for name, row in measured.rows.items()}))


if __name__ == "__main__":
    main()
