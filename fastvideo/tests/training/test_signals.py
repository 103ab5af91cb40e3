"""Real signals to a real process, in every phase of a run; what follows continues to the same bits."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.launch import Child, config_file
from fastvideo.tests.training.paused import paused
from fastvideo.training.run import run

TERMINATED = 75
LOADING = "fastvideo.distillation.adapters.analytic:AnalyticFolder.load_network", 2
STEP = "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method.critic_loss"
WARM_UP, TRAINING = (STEP, 1), (STEP, 8)
VALIDATION = "fastvideo.distillation.adapters.analytic:AnalyticCodec.decode", 3


@pytest.fixture
def values(analytic_values: dict[str, Any]) -> dict[str, Any]:
    changes = {"validation": {"every": 3, "prompts": ["0.0", "0.1"]}, "device": "cpu"}
    model = analytic_values["model"] | {"shape": [3, 2, 16, 16]}
    return analytic_values | changes | {"model": model}


def config_of(values: dict[str, Any]) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values, "test")


def start(values: dict[str, Any], place: tuple[str, int], *, forked: bool = True) -> Child:
    """A run in a process of its own, which has arrived at the place."""
    arguments = (place[0], place[1], "--config", str(config_file(values)))
    command = [sys.executable, "-m", "fastvideo.tests.training.paused", *map(str, arguments)]
    child = Child(partial(paused, *arguments) if forked else command)
    child.wait_for("READY\n")
    return child


def stop(child: Child, number: int) -> tuple[int, str]:
    """Exit code and messages after one signal."""
    child.signal(number)
    code = child.wait(60)
    assert "Traceback" not in child.text
    return code, " ".join(child.text.split())


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(next((Path(values["output"]) / "student").rglob("*.safetensors")))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """The results to the bit, and every line of the metrics but for its time, and as many videos."""
    one, two = weights(first), weights(second)
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (Path(v["output"]) / "metrics.jsonl").read_text().splitlines()]
        for v in (first, second)
    ]
    videos = [sorted(file.name for file in (Path(v["output"]) / "validation").iterdir()) for v in (first, second)]
    return all(torch.equal(one[name], two[name]) for name in one) and logs[0] == logs[1] and videos[0] == videos[1]


@pytest.fixture
def undisturbed(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    whole = values | {"output": str(tmp_path / "undisturbed")}
    run(config_of(whole))
    return whole


@pytest.mark.parametrize(
    ("place", "number", "code", "step"),
    [(TRAINING, "SIGTERM", 75, 8), (VALIDATION, "SIGUSR1", 75, 3), (WARM_UP, "SIGINT", 130, 1)],
    ids=["training", "validation", "warm-up"],
)
def test_a_signal_stops_the_run_at_a_step_with_a_checkpoint_from_which_it_goes_on_bit_equal(
    values: dict[str, Any],
    undisturbed: dict[str, Any],
    place: tuple[str, int],
    number: str,
    code: int,
    step: int,
) -> None:
    found, message = stop(start(values, place), signal.Signals[number])
    assert found == code
    assert f"stopped by {number} at step {step}; saved" in message
    command = f"fastvideo distill --config {values['output']}/config.yaml --resume"
    assert f"step-{step}, go on with: {command}" in message
    assert (Path(values["output"]) / "checkpoints" / f"step-{step}" / "manifest.json").is_file()
    assert not (Path(values["output"]) / "student").exists()
    run(config_of(values), resume=True)
    assert same(values, undisturbed)


def test_a_signal_while_a_network_is_loaded_leaves_nothing_behind(values: dict[str, Any]) -> None:
    code, message = stop(start(values, LOADING), signal.SIGTERM)
    assert (code, Path(values["output"]).exists()) == (TERMINATED, False)
    assert "stopped by SIGTERM in preparation, before a step was taken; start it again" in message


def test_a_second_signal_stops_at_once(values: dict[str, Any]) -> None:
    """Even while the main thread does not look: here it is held in a call of its own."""
    process = start(values | {"trainer": {"max_steps": 10**9}}, TRAINING)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.signal(number)
    assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "again: stopped at once, nothing was saved" in process.text


def test_signals_are_a_choice(values: dict[str, Any]) -> None:
    chosen = values | {"trainer": values["trainer"] | {"stop_signals": ["SIGUSR2"]}}
    code, message = stop(start(chosen, WARM_UP), signal.SIGUSR2)
    assert code == TERMINATED
    assert "stopped by SIGUSR2 at step 1" in message


@pytest.mark.parametrize("names", [["SIGKILL"], ["TERM"]])
def test_signals_that_cannot_be_caught_are_refused(values: dict[str, Any], names: list[str]) -> None:
    from fastvideo.errors import UserError

    with pytest.raises(UserError, match=r"trainer\.stop_signals: .*names such as SIGTERM"):
        config_of(values | {"trainer": {"stop_signals": names}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        ("fastvideo.distillation.adapters.wan_family.adapter:WanFamilyFolder.load_network", 1),
        ("fastvideo.distillation.adapters.wan_family.frames:WanFrameCodec.encode", 2),
        ("fastvideo.distillation.adapters.wan_family.frames:WanFrameCodec.decode", 1),
        ("fastvideo.distillation.methods.fine_tuning.sft:SFTMethod.times", 3),
    ],
    ids=["loading", "encoding the data", "validation", "training"],
)
def test_every_phase_of_a_run_on_the_tiny_world(tmp_path: Path, place: tuple[str, int]) -> None:
    values: dict[str, Any] = {
        "distill_model": "wan",
        "distill_method": "sft",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "roles": {"student": {"trainable": True}},
        "ladder": {"count": 2},
        "method": {},
        "data": {"size": 192, "batch_size": 2, "cache": str(tmp_path / "cache")},
        "trainer": {"max_steps": 5, "log_every": 2, "threads": 1},
        "validation": {"every": 2, "prompts": ["a red three"]},
        "device": "cpu",
    }
    code, _ = stop(start(values, place, forked=False), signal.SIGTERM)
    assert code == TERMINATED
    run(config_of(values), resume=Path(values["output"]).exists())
    whole = values | {"output": str(tmp_path / "whole")}
    run(config_of(whole))
    assert same(values, whole)
