"""``fastvideo doctor``: tell what will not work on this machine, before it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo.cli.arguments import OptionalFile, OptionalPath, Switch, parse

if TYPE_CHECKING:
    from fastvideo.distillation.builder import Config
    from fastvideo.doctor.checks import Finding, Wishes

MARKS = {"ok": "ok     ", "warning": "warning", "error": "error  "}


@dataclass(frozen=True)
class DoctorArguments:
    """Check driver, torch, packages, disks and output folder; exit code 1 if something will not work."""

    config: OptionalFile = None
    """A run's YAML file, or a recipe's name: check also what it asks for (CUDA, compiled blocks, model, URLs)."""
    out: OptionalPath = None
    """Folder that a run will write to. Default: the config's, else `outputs`."""
    json: Switch = False
    """Print one JSON object instead of lines."""


def main(argv: Sequence[str]) -> int:
    """Print the findings; returns 1 if one is an error, else 0."""
    arguments = parse(DoctorArguments, argv, "doctor")

    from fastvideo.doctor.checks import examine
    from fastvideo.doctor.facts import gather

    findings = examine(gather(), wishes_of(arguments.config, arguments.out))
    wrong = sum(finding.level == "error" for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(lines(findings)))
    return 1 if wrong else 0


def lines(findings: Sequence[Finding]) -> list[str]:
    """A line per finding with its mend below, and a summary."""
    width = max(len(finding.subject) for finding in findings)
    shown = []
    for finding in findings:
        shown.append(f"{MARKS[finding.level]}  {finding.subject:<{width}}  {finding.text}")
        if finding.mend:
            shown.append(f"{'':<9}{'':<{width}}  -> {finding.mend}")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    return [*shown, "", f"{counts['error']} errors, {counts['warning']} warnings"]


def wishes_of(config: Path | None, out: Path | None) -> Wishes:
    """Wishes of a config, or of no run in particular.

    Raises:
        UserError: for a config that is not valid.
    """
    from fastvideo.doctor.checks import Wishes

    if config is None:
        return Wishes(out or Path("outputs"))

    from fastvideo.distillation.config.reading import read_config

    wanted = read_config(config, {})
    model = wanted.model.model_dump()
    urls = tuple(urls_in(wanted.model_dump(mode="json")))
    compiled, models = bool(model.get("compile_blocks")), models_of(wanted)
    return Wishes(out or Path(wanted.output), wanted.device == "cuda", compiled, models, urls)


def models_of(config: Config) -> dict[str, str]:
    """Paths of the models and LoRA files of a config by their keys, but for embedded ones and URLs."""
    from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
    from fastvideo.storage import is_remote

    found = {"model.path": config.model.model_dump().get("path")}
    for name, role in config.roles.items():
        key = f"roles.{name}"
        found |= {f"{key}.path": role.path, f"{key}.model.path": (role.model or {}).get("path")}
        found |= {f"{key} LoRA {number}": file for number, file in enumerate(role.lora_files, 1)}
    return {key: path for key, path in found.items() if path and path not in EMBEDDED and not is_remote(path)}


def urls_in(value: object) -> Iterator[str]:
    """URLs among the values of a config, at any depth."""
    from fastvideo.storage import is_remote

    if isinstance(value, str) and is_remote(value):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from urls_in(inner)
