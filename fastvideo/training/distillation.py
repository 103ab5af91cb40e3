"""The training entry: ``python fastvideo/training/distillation.py --config run.yaml``, also under torchrun.

``fastvideo distill`` is the same. The config file names model and method; ``--distill-model`` and ``--distill-method``
override them, and every other field has a flag of its own (``--method.student-learning-rate 2e-5``).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from fastvideo.distillation.builder import Config


@dataclass(frozen=True)
class Launch:
    """Distil a model: `fastvideo distill --config run.yaml [--SECTION.FIELD VALUE ...]`.

    Every field of the config is a flag: `fastvideo distill --config run.yaml --help` lists them with their meaning and
    their value in that file. `--init-student-from PATH` (or another role's name) is short for the role's `init_from`.
    Ready configs are in examples/distillation/.
    """

    config: Path
    """The run's YAML file."""
    distill_model: str | None = None
    """Model family, instead of the config's; `fastvideo list` shows all."""
    distill_method: str | None = None
    """Algorithm, instead of the config's; `fastvideo list` shows all."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the output folder from its newest intact checkpoint."""
    resume_from: Path | None = None
    """Continue from this checkpoint, in the output folder that it is in or in a new one."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what the output folder holds."""


def parse(argv: Sequence[str], model: str | None = None) -> tuple[Launch, Config]:
    """Flags and file to a validated config.

    Raises:
        UserError: for a config that is not valid.
        SystemExit: after ``--help``, or for a flag that does not exist.
    """
    wants_help = any(flag in argv for flag in ("--help", "-h")) and "--config" in argv
    kept = [a for a in argv if not (wants_help and a in ("--help", "-h"))]
    launch, rest = tyro.cli(Launch, args=kept, prog="fastvideo distill", return_unknown_args=True)

    from fastvideo.distillation.builder import run_schema
    from fastvideo.distillation.config.reading import read_yaml, validate
    from fastvideo.distillation.types import UserError

    values = read_yaml(launch.config)
    chosen = {"distill_model": model or launch.distill_model, "distill_method": launch.distill_method}
    values |= {key: name for key, name in chosen.items() if name}
    for key in chosen:
        if not isinstance(values.get(key), str):
            raise UserError(f"config {launch.config}: {key} is missing; give it there or as --{key.replace('_', '-')}")
    try:
        schema = run_schema(values["distill_model"], values["distill_method"])
    except UserError as error:
        raise UserError(f"config {launch.config}: distill_model, distill_method: {error}") from error
    config = validate(schema, values, str(launch.config))
    if rest or wants_help:
        config = _override(
            schema, config, [*_role_flags(rest, config), *(["--help"] if wants_help else [])], str(launch.config)
        )
    return launch, config


def _role_flags(flags: list[str], config: Config) -> list[str]:
    """``--init-ROLE-from`` as the flag of the config field that it stands for."""
    from fastvideo.distillation.types import UserError

    found = []
    for flag in flags:
        short = re.fullmatch(r"--init-([a-z0-9_-]+)-from(=.*)?", flag)
        if short and short[1].replace("-", "_") not in config.roles:
            raise UserError(f"{flag}: the config has no role {short[1]!r}; it has {', '.join(config.roles)}")
        found.append(f"--roles.{short[1]}.init-from{short[2] or ''}" if short else flag)
    return found


def _override(schema: type[Config], config: Config, flags: list[str], source: str) -> Config:
    from fastvideo.distillation.config.reading import validate

    changed: Any = tyro.cli(schema, args=flags, default=config, prog="fastvideo distill", description="Config fields.")
    return validate(schema, changed.model_dump(mode="json"), source)


def main(argv: Sequence[str] | None = None, model: str | None = None) -> int:
    """Run; the exit code: 0, or 2 for a mistake in what the user gave."""
    began = time.monotonic()
    launch, config = parse(sys.argv[1:] if argv is None else argv, model)

    from fastvideo.training.run import run

    run(config, resume=launch.resume, overwrite=launch.overwrite, resume_from=launch.resume_from, began=began)
    return 0


def guarded(argv: Sequence[str] | None = None, model: str | None = None) -> int:
    """:func:`main`, with a user's mistake as one message on stderr and exit code 2."""
    from fastvideo.cli import report_user_errors

    return report_user_errors(lambda: main(argv, model))


if __name__ == "__main__":
    raise SystemExit(guarded())
