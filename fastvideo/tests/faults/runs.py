"""Whole runs in forked processes that are killed at any moment, and what they must end with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.environment import environment
from fastvideo.tests.launch import fork
from fastvideo.training.output import was_started
from fastvideo.training.run import run

TRIES = 50
"""Kills that may come too late, because the run had ended, before a moment counts as not to be had."""


def analytic_run(folder: Path, asynchronous: bool = False) -> dict[str, Any]:
    """DMD2 on a Gaussian: 24 steps of two micro-batches, a checkpoint every 4."""
    prompts = folder / "prompts.txt"
    prompts.write_text("0.0\n" * 22)
    return {
        "distill_model": "analytic",
        "distill_method": "dmd2",
        "device": "cpu",
        "model": {"means": [0.7], "stds": [0.4], "weights": [1.0]},
        "roles": {
            "student": {"trainable": True, "path": "consistency"},
            "teacher": {"trainable": False},
            "critic": {"trainable": True},
        },
        "method": {"teacher_guidance": 1.0, "student_learning_rate": 0.01, "critic_learning_rate": 0.01},
        "data": {"prompts": str(prompts), "batch_size": 4},
        "trainer": {"max_steps": 24, "log_every": 3, "grad_accumulation": 2, "threads": 1},
        "checkpoint": {"every": 4, "asynchronous": asynchronous},
    }


def wan_run(folder: Path) -> dict[str, Any]:
    """DMD2 on the embedded Wan model: 4 steps, a checkpoint after each, saved in a thread."""
    values = analytic_run(folder)
    (folder / "prompts.txt").write_text("a red seven\na green three\n" * 8)
    roles = {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}
    return values | {
        "distill_model": "wan",
        "model": {"path": "tiny"},
        "roles": roles,
        "method": {"teacher_guidance": 1.5, "generator_update_interval": 2},
        "data": {"prompts": values["data"]["prompts"], "batch_size": 1},
        "trainer": {"max_steps": 4, "log_every": 1, "threads": 1},
        "checkpoint": {"every": 1, "asynchronous": True},
    }


def start(values: dict[str, Any], output: Path) -> int:
    """The run in a forked process, resumed if one was started there; its number."""
    schema = run_schema(values["distill_model"], values["distill_method"])

    def work() -> None:
        run(validate(schema, values | {"output": str(output)}, "the run"), resume=was_started(output))

    return fork(work, silent=True)


def finish(values: dict[str, Any], output: Path) -> float:
    """The run to its end; seconds it took."""
    begin = time.monotonic()
    status = os.waitpid(start(values, output), 0)[1]
    assert status == 0, f"the run in {output} ended with status {status}"
    return time.monotonic() - begin


def killed_after(values: dict[str, Any], output: Path, seconds: float) -> bool:
    """Start the run and kill it; whether it was still running."""
    child = start(values, output)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return bool(os.waitpid(child, 0)[1] == signal.SIGKILL)


def outcome(output: Path) -> dict[str, Any]:
    """Everything that a run ends with: its result, its last checkpoint, its metrics without their times."""
    checkpoint = max((output / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*checkpoint.glob("process-*"), checkpoint / "shared.json", *(output / "student").rglob("*.safetensors")]
    found: dict[str, Any] = {str(file.relative_to(output)): file.read_bytes() for file in files}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


def warm_up(values: dict[str, Any]) -> None:
    """Import and read here what every child would import and read again."""
    import_module("torch.utils.tensorboard")
    environment()
    schema = run_schema(values["distill_model"], values["distill_method"])
    config = validate(schema, values | {"output": "unused"}, "the run")
    adapter = build_adapter(config)
    build_method(config, adapter)  # with its optimizers, the first of which makes torch import its compiler
    adapter.conditioner.encode_prompts([Path(values["data"]["prompts"]).read_text().split("\n")[0]])


@dataclass
class Killer:
    """Kills one run again and again, each time a fresh one at a moment that a seed draws."""

    values: dict[str, Any]
    folder: Path
    draw: random.Random

    def __post_init__(self) -> None:
        warm_up(self.values)
        finish(self.values, self.folder / "warm")
        self.duration = finish(self.values, self.folder / "undisturbed")
        self.expected = outcome(self.folder / "undisturbed")
        assert outcome(self.folder / "warm") == self.expected, "the run does not repeat itself"

    def survives_one(self) -> bool:
        """Kill a run, go on to its end; whether that is the end of the undisturbed one, to the bit."""
        output = self.folder / "killed"
        for _ in range(TRIES):
            shutil.rmtree(output, ignore_errors=True)
            if killed_after(self.values, output, self.draw.uniform(0.0, self.duration)):
                finish(self.values, output)
                return outcome(output) == self.expected
        raise AssertionError("no kill came in time")
