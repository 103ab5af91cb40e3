"""The training entry: ``python fastvideo/training/distillation.py --config run.yaml``, also under torchrun.

``fastvideo distill`` is the same. The config file names model and method; ``--distill-model`` and ``--distill-method``
override them, and every other field has a flag of its own (``--method.student-learning-rate 2e-5``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from fastvideo.distillation.builder import Config


@dataclass(frozen=True)
class Launch:
    """Distil a model: `fastvideo distill --config run.yaml [--SECTION.FIELD VALUE ...]`.

    Every field of the config is a flag: `fastvideo distill --config run.yaml --help` lists them with their meaning and
    their value in that file. `--init-student-from PATH` (or another role's name) is short for the role's `init_from`.
    `fastvideo recipes` lists ready configs.
    """

    config: Path
    """The run's YAML file, or a recipe's name; `fastvideo recipes` lists them."""
    distill_model: str | None = None
    """Model family, instead of the config's; `fastvideo list` shows all."""
    distill_method: str | None = None
    """Algorithm, instead of the config's; `fastvideo list` shows all."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the output folder from its newest intact checkpoint."""
    resume_from: Annotated[str | None, tyro.conf.arg(metavar="PATH|URL")] = None
    """Continue from this checkpoint, in the output folder that it is in or in a new one. A URL (`s3://...`) may also
    name a run's mirror, whose newest one is taken."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what an earlier run made in the output folder; other files stay."""


def parse(argv: Sequence[str], model: str | None = None) -> tuple[Launch, Config]:
    """Read flags and file into a validated config.

    Raises:
        UserError: for a config that is not valid.
        SystemExit: after ``--help``, or for a flag that does not exist.
    """
    wants_help = any(flag in argv for flag in ("--help", "-h")) and "--config" in argv
    kept = [a for a in argv if not (wants_help and a in ("--help", "-h"))]
    launch, rest = tyro.cli(Launch, args=kept, prog="fastvideo distill", return_unknown_args=True)

    from fastvideo.distillation.config.overrides import read_flags
    from fastvideo.distillation.config.reading import read_config

    chosen = {"distill_model": model or launch.distill_model, "distill_method": launch.distill_method}
    named = {key: [name] for key, name in chosen.items() if name}
    flags = read_flags(rest)
    _check_launch_flags(flags)
    config = read_config(launch.config, named | flags)
    if wants_help:
        _print_fields(config)
    return launch, config


def _check_launch_flags(flags: Iterable[str]) -> None:
    """Suggest the nearest launch flag for a misspelt one; the schema checks the config's own flags."""
    from fastvideo.distillation.config.schema import RunConfig
    from fastvideo.errors import UserError
    from fastvideo.wording import nearest

    known = [field.name for field in fields(Launch)]
    for key in flags:
        misspelt = "." not in key and key not in RunConfig.model_fields
        if misspelt and (near := nearest(key, known)):
            raise UserError(f"--{key.replace('_', '-')}: unknown flag; did you mean '--{near.replace('_', '-')}'?")


def _print_fields(config: Config) -> None:
    """Print every field with its meaning and its value in the config, and exit."""
    described = {"prog": "fastvideo distill", "description": "Config fields."}
    tyro.cli(type(config), args=["--help"], default=config, config=(tyro.conf.AvoidSubcommands,), **described)


def main(argv: Sequence[str] | None = None, model: str | None = None) -> int:
    """Run; returns exit code 0."""
    began = time.monotonic()
    launch, config = parse(sys.argv[1:] if argv is None else argv, model)

    from fastvideo.storage import place
    from fastvideo.training.run import run

    source = place(launch.resume_from) if launch.resume_from else None
    run(config, resume=launch.resume, overwrite=launch.overwrite, resume_from=source, began=began)
    return 0


def guarded(argv: Sequence[str] | None = None, model: str | None = None) -> int:
    """:func:`main`, with a user's mistake as one message on stderr and exit code 2."""
    from fastvideo.entry import report_user_errors, speak_utf8

    if argv is None:
        speak_utf8()
    return report_user_errors(lambda: main(argv, model))


if __name__ == "__main__":
    from fastvideo.entry import end_process

    end_process(guarded())
