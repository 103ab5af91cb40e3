"""The run's folder: never overwritten by accident, and enough in it to run again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from fastvideo.data.faults import LIST as SKIPPED
from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.engine.checkpoint.initial import parse_origin
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment
from fastvideo.files import replace_file
from fastvideo.storage import Place
from fastvideo.training.lock import LOCK
from fastvideo.training.texts import LEFT_OUT

RUN_FILES = ("config.yaml", "environment.json")
"""Files that every run writes first; a folder with them is a run's."""
MADE = (
    *("checkpoints", "snapshots", "student", "student.partial", "validation", "non_finite", "stacks", "profile"),
    *("metrics.jsonl", "health.jsonl", "performance.jsonl", "startup.jsonl", "tensorboard", "memory-rank-*.pickle"),
    *(LEFT_OUT, SKIPPED, "report.html", "metrics.json", "videos/index.json", "samples/*/model.json"),
    *("videos.partial", "averaged", "averaged.partial", "averaged-*", ".*.part"),
)
"""What a run, its report, evaluations and averages leave in its folder beside those: names, or what a folder holds."""


def check_output(config: Config, *, resume: bool, overwrite: bool, resume_from: Place | None = None) -> None:
    """Refuse a folder that is not empty, unless a flag says to resume or overwrite it.

    Raises:
        UserError: for a folder without such a flag, flags that exclude each other, or if overwriting would delete from
            a folder that is not a run's, or what this run reads.
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
            run = "another run: continue it with --resume, delete it with --overwrite, or"
            held = run if _is_run(output) else "files that no run made:"
            raise UserError(f"output folder {output} holds {held} choose another with --output")
        _check_overwrite(config, output)


def was_started(output: Path) -> bool:
    """True if a run has begun here: it left its config, or (if killed early) its lock."""
    return (output / RUN_FILES[0]).is_file() or (output / LOCK).exists()


def in_use(output: Path) -> bool:
    """True if a folder holds anything but a lock."""
    return output.is_dir() and any(entry.name != LOCK for entry in output.iterdir())


def _is_run(output: Path) -> bool:
    """True for a folder that --overwrite takes: a run has written its files, or was killed before."""
    return (output / LOCK).exists() or all((output / name).is_file() for name in RUN_FILES)


def _check_overwrite(config: Config, output: Path) -> None:
    if not _is_run(output):
        raise UserError(
            f"--overwrite: {output} was not made by a run (no {' and '.join(RUN_FILES)}); choose another with --output"
        )
    deleted = [entry.resolve() for entry in _made_by_runs(output)]
    for source in filter(os.path.exists, _sources(config)):
        read = Path(source).resolve()
        if read == output.resolve() or any(read.is_relative_to(entry) for entry in deleted):
            raise UserError(f"--overwrite would delete {source}, which this run reads; choose another --output")


def _sources(config: Config) -> Iterator[str]:
    """Every text of the config that may name what the run reads."""
    yield from _texts(config.model_dump(mode="json", exclude={"output": True, "data": {"cache"}}))
    yield from (str(parse_origin(role.init_from).folder) for role in config.roles.values() if role.init_from)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _made_by_runs(output: Path) -> list[Path]:
    """Entries of a run's folder that overwriting deletes."""
    found = {file.relative_to(output).parts[0] for pattern in MADE for file in output.glob(pattern)}
    return [output / name for name in sorted(found)]


def prepare_output(config: Config, *, overwrite: bool) -> list[str]:
    """Make the folder, with resolved config, package versions and code revision; returns messages.

    Overwriting deletes what runs made and keeps the rest.
    """
    output = Path(config.output)
    for entry in _made_by_runs(output) if overwrite else []:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    kept = [path.name for path in output.iterdir() if path.name not in (*RUN_FILES, LOCK)] if overwrite else []
    replace_file(output / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    replace_file(output / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return [f"kept in {output}, not made by a run: {', '.join(sorted(kept))}"] if kept else []


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
