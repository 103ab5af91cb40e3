"""The run's folder: never written over by accident, and enough in it to run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastvideo.distillation.builder import Config
from fastvideo.distillation.config import read_yaml
from fastvideo.distillation.engine.checkpoint import complete_checkpoints
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment

RUN_FILES = ("config.yaml", "environment.json")
"""What every run writes first, and what makes a folder a run's."""
HARMLESS = {"output", "device", "validation", "checkpoint"}
HARMLESS_IN_TRAINER = {"max_steps", "log_every", "threads", "non_finite", "max_skips"}
"""What a resumed run may change."""


def check_output(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless told what to do with it.

    Raises:
        UserError: if it is not empty and neither flag is given, both are, there is nothing to resume, the config to
            resume is another one, or overwriting would delete what is no run or what this run reads.
    """
    output = Path(config.output)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume:
        _check_resume(config, output)
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(
                f"output folder {output} holds another run: continue it with --resume, delete it with --overwrite, "
                f"or choose another with --output"
            )
        _check_overwrite(config, output)


def _check_overwrite(config: Config, output: Path) -> None:
    if not all((output / name).is_file() for name in RUN_FILES):
        raise UserError(
            f"--overwrite: {output} was not made by a run (no {' and '.join(RUN_FILES)}); delete it yourself"
        )
    sources = [config.model.path, config.data.path, config.data.prompts, *(r.path for r in config.roles.values())]
    for source in filter(None, sources):
        if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise UserError(f"--overwrite would delete {source}, which this run reads; choose another --output")


def _check_resume(config: Config, output: Path) -> None:
    if not complete_checkpoints(output / "checkpoints"):
        raise UserError(f"--resume: no complete checkpoint in {output / 'checkpoints'}")
    before, now = _flat(read_yaml(output / "config.yaml")), _flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _harmless(key)
    ]
    if changed:
        raise UserError("--resume: this config is not the run's, and would change it silently: " + "; ".join(changed))


def _harmless(key: str) -> bool:
    section, _, field = key.partition(".")
    return section in HARMLESS or (section == "trainer" and field in HARMLESS_IN_TRAINER)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def prepare_output(config: Config, *, overwrite: bool) -> None:
    """Make the folder, with what is needed to run again: resolved config, package versions, code revision."""
    output = Path(config.output)
    if overwrite and output.is_dir():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
