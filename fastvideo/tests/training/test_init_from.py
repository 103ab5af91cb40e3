"""A role starts from any role of any checkpoint, or from a model folder; what does not fit is one message."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from torch import Tensor

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.checkpoint.restore import role_weights
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.training.distillation import parse
from fastvideo.training.run import run


def config_of(values: dict[str, Any], **changes: Any) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values | changes, "test")


def starting(values: dict[str, Any], role: str, origin: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights that a role has before the first step, and what the run says about it."""
    roles = {name: dict(entry) for name, entry in values["roles"].items()}
    roles[role]["init_from"] = origin
    config = config_of(values, roles=roles)
    method = build_method(config, build_adapter(config))
    return method.bundle[role].network.state_dict(), method.notes


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def trained(analytic_values: dict[str, Any]) -> Path:
    """The checkpoint of a finished run."""
    run(config_of(analytic_values | {"checkpoint": {"every": 12}}))
    return Path(analytic_values["output"]) / "checkpoints" / "step-12"


@pytest.mark.parametrize(
    ("role", "suffix", "expected"),
    [
        ("student", "", ("student", "ema")),
        ("student", ":student:live", ("student", "network")),
        ("critic", "", ("critic", "network")),
        ("teacher", ":critic", ("critic", "network")),
        ("teacher", ":critic:live", ("critic", "network")),
    ],
)
def test_any_role_starts_from_any_role_of_a_checkpoint(
    analytic_values: dict[str, Any], trained: Path, role: str, suffix: str, expected: tuple[str, str]
) -> None:
    found, notes = starting(analytic_values, role, f"{trained}{suffix}")
    assert same(found, role_weights(trained, *expected))
    kind = "ema" if expected[1] == "ema" else "live"
    assert notes == (f"role {role} starts from the {kind} weights of role {expected[0]}, step 12, in {trained}",)


def test_a_checkpoint_at_a_url_is_a_start(
    analytic_values: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_CACHE", str(tmp_path / "cache"))
    bucket = fsspec.filesystem("memory")
    bucket.put(str(trained), "/starts/step-12", recursive=True)
    found, notes = starting(analytic_values, "student", "memory://starts/step-12:student:live")
    assert same(found, role_weights(trained, "student", "network"))
    assert "the live weights of role student, step 12" in notes[0]
    with pytest.raises(UserError, match=r"roles.student.init_from: memory://starts/step-13 does not exist"):
        starting(analytic_values, "student", "memory://starts/step-13")


def test_a_runs_folder_stands_for_its_newest_checkpoint(analytic_values: dict[str, Any], trained: Path) -> None:
    found, _ = starting(analytic_values, "student", str(trained.parents[1]))
    assert same(found, role_weights(trained, "student", "ema"))


def test_a_role_starts_from_a_model_folder(analytic_values: dict[str, Any], trained: Path) -> None:
    folder = trained.parents[1] / "student"
    found, _ = starting(analytic_values, "student", str(folder))
    assert same(found, role_weights(trained, "student", "ema"))


@pytest.mark.parametrize(
    ("role", "suffix", "message"),
    [
        ("student", ":critic", r"roles\.student\.init_from: the weights of role 'critic' of .* 1 unknown here \(log_w"),
        ("student", ":judge", r"holds no role 'judge'; it holds student, critic"),
        ("critic", ":critic:ema", r"holds no averaged weights of role 'critic'"),
        ("student", ":student:best", r"is no folder: a checkpoint"),
        ("student", "-absent", r"is no folder: a checkpoint"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_one_message(
    analytic_values: dict[str, Any], trained: Path, role: str, suffix: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        starting(analytic_values, role, f"{trained}{suffix}")


def test_shapes_that_differ_are_named(analytic_values: dict[str, Any], trained: Path) -> None:
    model = {"means": [0.0, 1.0], "stds": [0.4, 0.4], "weights": [1.0, 1.0]}
    values = analytic_values | {"model": model}
    values["roles"] = {**values["roles"], "student": {"trainable": True}}
    with pytest.raises(UserError, match=r"mean has shape \[1\] instead of \[2\]"):
        starting(values, "critic", str(trained))


def test_a_damaged_checkpoint_is_refused(analytic_values: dict[str, Any], trained: Path) -> None:
    file = trained / "process-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"init_from: checkpoint .*safetensors has \d+ bytes instead of \d+"):
        starting(analytic_values, "student", str(trained))


def test_the_flag_names_the_role_and_the_resumed_run_needs_neither_flag_nor_origin(
    analytic_values: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    values = analytic_values | {"output": str(tmp_path / "second"), "checkpoint": {"every": 12}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    arguments = ["--config", str(file), "--trainer.max-steps", "12"]
    _, config = parse([*arguments, "--init-critic-from", f"{trained}:critic", f"--init-student-from={trained}"])
    assert config.roles["critic"].init_from == f"{trained}:critic"
    assert config.roles["student"].init_from == str(trained)
    run(config)
    shutil.rmtree(trained)
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 14}}), resume=True)
    with pytest.raises(UserError, match=r"no role 'judge'; it has critic, student, teacher"):
        parse([*arguments, "--init-judge-from", "x"])
