"""The run's folder: never overwritten by accident, and enough in it to run again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import yaml

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.engine.checkpoint.initial import parse_origin
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment
from fastvideo.files import replace_file
from fastvideo.storage import Place
from fastvideo.training.lock import LOCK

RUN_FILES = ("config.yaml", "environment.json")
"""Files that every run writes first; a folder with them is a run's."""


def check_output(config: Config, *, resume: bool, overwrite: bool, resume_from: Place | None = None) -> None:
    """Refuse a folder that is not empty, unless a flag says to resume or overwrite it.

    Raises:
        UserError: for a folder without such a flag, flags that exclude each other, or if overwriting would delete a
            folder that is not a run, or one this run reads from.
    """
    output = Path(config.output)
    if (resume or resume_from) and overwrite:
        raise UserError(f"{'--resume' if resume else '--resume-from'} and --overwrite exclude each other")
    if resume and resume_from:
        raise UserError("--resume takes the newest checkpoint, --resume-from the one it names: give one of them")
    if resume and not was_started(output) and config.checkpoint.mirror is None:
        raise UserError(f"--resume: {output} is no run's folder (no config.yaml): nothing to go on from")
    if resume or (isinstance(resume_from, Path) and resume_from.resolve().is_relative_to(output.resolve())):
        return
    if in_use(output):
        if not overwrite:
            raise UserError(
                f"output folder {output} holds another run: continue it with --resume, delete it with --overwrite, "
                f"or choose another with --output"
            )
        _check_overwrite(config, output)


def was_started(output: Path) -> bool:
    """True if a run has begun here: it left its config, or (if killed early) its lock."""
    return (output / RUN_FILES[0]).is_file() or (output / LOCK).exists()


def in_use(output: Path) -> bool:
    """True if a folder holds anything but a lock."""
    return output.is_dir() and any(entry.name != LOCK for entry in output.iterdir())


def _check_overwrite(config: Config, output: Path) -> None:
    if not (output / LOCK).exists() and not all((output / name).is_file() for name in RUN_FILES):
        raise UserError(
            f"--overwrite: {output} was not made by a run (no {' and '.join(RUN_FILES)}); delete it yourself"
        )
    data = config.data
    sources = [
        config.model.path,
        data.path,
        data.prompts,
        data.switch_prompts,
        *(r.path for r in config.roles.values()),
    ]
    sources += [str(parse_origin(r.init_from).folder) for r in config.roles.values() if r.init_from]
    sources += [file for role in config.roles.values() for file in role.lora_files]
    for source in filter(None, sources):
        if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise UserError(f"--overwrite would delete {source}, which this run reads; choose another --output")


def prepare_output(config: Config, *, overwrite: bool) -> None:
    """Make the folder, with resolved config, package versions and code revision."""
    output = Path(config.output)
    for entry in list(output.iterdir()) if overwrite and output.is_dir() else []:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    replace_file(output / "environment.json", json.dumps(environment(), indent=2) + "\n")


def resume_command(config: Config) -> str:
    """The command that continues this run from its folder."""
    return f"fastvideo distill --config {shlex.quote(str(Path(config.output) / RUN_FILES[0]))} --resume"


def next_commands(config: Config, adapter: Adapter) -> list[str]:
    """Commands that show the result of a finished run; a family without a pipeline makes no videos."""
    output = Path(config.output)
    report = f"fastvideo report {shlex.quote(str(output))}"
    if not adapter.Config.pipelines:
        return [f"next: {report}"]
    prompt = next(iter(config.validation.prompts), "a green seven moving up and left")
    image = " --image FILE" if of_frames(adapter.conditioner).needs_frames else ""
    student = shlex.quote(str(output / "student"))
    return [f"next: fastvideo generate {student} --prompt {shlex.quote(prompt)}{image}", f"      {report}"]
