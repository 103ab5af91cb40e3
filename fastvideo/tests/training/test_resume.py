"""Whole runs that go on: from the newest intact checkpoint, from one that is asked for, and when that is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastvideo.distillation.config.base import Section
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.schema import HealthConfig, TrackingConfig, ValidationConfig
from fastvideo.distillation.engine.optional.snapshots import saved_step, snapshots_in
from fastvideo.distillation.registry import METHODS, run_schema
from fastvideo.errors import UserError
from fastvideo.tests.training.test_run import config_of, result
from fastvideo.training.resume import check_config, flat, is_resumable
from fastvideo.training.run import run


def test_resume_continues_bit_exactly_between_a_student_and_a_critic_step(
    analytic_values: dict, tmp_path: Path
) -> None:
    whole = analytic_values | {"output": str(tmp_path / "whole"), "checkpoint": {"every": 7}}
    whole["trainer"] = {"max_steps": 12, "log_every": 3, "grad_accumulation": 2}
    run(config_of(whole))
    parts = whole | {"output": str(tmp_path / "parts")}
    run(config_of(parts | {"trainer": whole["trainer"] | {"max_steps": 7}}))
    run(config_of(parts), resume=True)
    first, second = result(whole), result(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("whole", "parts")]
    for line in last:
        del line["seconds"]
    assert last[0] == last[1]


def test_a_run_that_its_budget_ended_between_two_checkpoints_goes_on_exactly(
    analytic_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = analytic_values | {"checkpoint": {"every": 4}}
    whole, parts = (values | {"output": str(tmp_path / name)} for name in ("whole", "parts"))
    run(config_of(whole))
    clock = iter(range(1000))  # each step takes one second
    monkeypatch.setattr("fastvideo.distillation.trainer.time.process_time", lambda: float(next(clock)))
    run(config_of(parts | {"trainer": values["trainer"] | {"max_cpu_seconds": 4.5}}))
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-4", "step-5"]
    run(config_of(parts), resume=True)
    first, second = result(whole), result(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_snapshots_of_a_resumed_run_are_those_of_an_undisturbed_one(analytic_values: dict, tmp_path: Path) -> None:
    """To the byte, and later ones than the checkpoint are gone; from another run's checkpoint they are copied."""
    values = analytic_values | {"checkpoint": {"every": 5, "keep": 4}, "ema": {"post_hoc": {"every": 2, "keep": 4}}}
    values["method"] = analytic_values["method"] | {"generator_update_interval": 1}
    whole = values | {"output": str(tmp_path / "whole")}
    run(config_of(whole))
    files = snapshots(tmp_path / "whole")
    assert [name[:15] for name in files] == [f"update-{update:08d}" for update in (4, 4, 8, 8, 12, 12)]
    parts = values | {"output": str(tmp_path / "parts")}
    run(config_of(parts | {"trainer": values["trainer"] | {"max_steps": 8}}))
    assert "update-00000008-std-0.1.safetensors" in snapshots(tmp_path / "parts")
    back = tmp_path / "parts" / "checkpoints" / "step-5"
    run(config_of(parts | {"trainer": values["trainer"] | {"max_steps": 7}}), resume_from=back)
    assert [int(name[7:15]) for name in snapshots(tmp_path / "parts")] == [2, 2, 4, 4, 6, 6, 7, 7]
    again = tmp_path / "whole" / "checkpoints" / "step-5"
    run(config_of(parts), resume=True)
    copied = values | {"output": str(tmp_path / "copy")}
    run(config_of(copied | {"trainer": values["trainer"] | {"max_steps": 7}}), resume_from=again)
    assert [int(name[7:15]) for name in snapshots(tmp_path / "copy")] == [4, 4, 6, 6, 7, 7]
    run(config_of(copied), resume=True)
    assert snapshots(tmp_path / "parts") == files
    assert snapshots(tmp_path / "copy") == files


def test_a_run_that_goes_on_without_its_snapshots_says_so(analytic_values: dict, capsys: Any) -> None:
    values = analytic_values | {"checkpoint": {"every": 10}, "ema": {"post_hoc": {"every": 1}}}
    run(config_of(values))
    shutil.rmtree(Path(values["output"]) / "snapshots")
    run(config_of(values), resume=True)
    assert "no snapshots up to update" in capsys.readouterr().err
    written = snapshots_in(Path(values["output"]) / "snapshots")
    assert {saved_step(file) for file in written.values()} == {values["trainer"]["max_steps"]}


def snapshots(folder: Path) -> dict[str, bytes]:
    """Content of a run's snapshots by name."""
    return {file.name: file.read_bytes() for file in sorted((folder / "snapshots").iterdir())}


def test_a_resumed_run_logs_each_step_once(analytic_values: dict) -> None:
    """The first run dies after step 12 was logged; the newest checkpoint is of step 10."""
    values = analytic_values | {"checkpoint": {"every": 5}}
    run(config_of(values))
    cut_off(values, 12)
    run(config_of(values), resume=True)
    lines = (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 12]


def test_a_damaged_checkpoint_is_named_and_passed_over_but_refused_by_its_path(analytic_values: dict, capsys) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    whole = result(values)
    newest = Path(values["output"]) / "checkpoints" / "step-12"
    content = bytearray((newest / "process-0.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "process-0.safetensors").write_bytes(content)
    shutil.rmtree(Path(values["output"]) / "student")
    with pytest.raises(UserError, match=r"step-12 cannot be used: process-0\.safetensors is damaged"):
        run(config_of(values), resume_from=newest)
    run(config_of(values), resume=True)
    said = "".join(capsys.readouterr().err.split())  # a narrow console breaks lines anywhere
    assert "step-12:process-0.safetensorsisdamaged" in said
    assert "resumedatstep6" in said
    assert all(torch.equal(tensor, result(values)[name]) for name, tensor in whole.items())


def test_an_incomplete_checkpoint_is_passed_over_and_old_ones_are_removed(analytic_values: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 3, "keep": 2}}
    run(config_of(values))
    folder = Path(values["output"]) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-12", "step-9"]
    cut_off(values, 12)
    run(config_of(values), resume=True)
    assert (folder / "step-12" / "manifest.json").is_file()


def test_resume_refuses_a_config_that_would_change_the_run(analytic_values: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    changed = values | {"method": values["method"] | {"student_learning_rate": 0.02}}
    with pytest.raises(UserError, match=r"method\.student_learning_rate: 0\.01 -> 0\.02"):
        run(config_of(changed), resume=True)
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 14}}), resume=True)


def test_half_a_line_of_metrics_is_dropped_on_resume(analytic_values: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    log = Path(values["output"]) / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 13, "sec')
    run(config_of(values), resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [3, 6, 9, 12]


def test_a_run_that_was_cut_off_before_its_first_checkpoint_starts_anew_on_resume(
    analytic_values: dict, capsys
) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    whole = result(values)
    cut_off(values, 6, 12)
    run(config_of(values), resume=True)
    assert "startingatstep0" in "".join(capsys.readouterr().err.split())
    assert all(torch.equal(tensor, result(values)[name]) for name, tensor in whole.items())
    lines = (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 12]


def cut_off(values: dict[str, Any], *steps: int) -> None:
    """Leave a run's folder as if it had been killed: some saves were not finished, and there is no student."""
    for step in steps:
        (Path(values["output"]) / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    shutil.rmtree(Path(values["output"]) / "student")


@pytest.mark.parametrize(
    ("every", "reason"),
    [
        (0, r"checkpoints holds no complete checkpoint: .*student --output FOLDER, or start anew with --overwrite"),
        (5, r"the newest intact checkpoint is \S+step-10: .*FOLDER, or go back with --resume-from \S+step-10"),
    ],
)
def test_resume_never_replaces_a_finished_student_by_an_older_step(
    analytic_values: dict, every: int, reason: str
) -> None:
    values = analytic_values | {"checkpoint": {"every": every}}
    output = run(config_of(values)).parent
    shutil.rmtree(output / "checkpoints" / "step-12", ignore_errors=True)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    longer = config_of(values | {"trainer": values["trainer"] | {"max_steps": 14}})
    with pytest.raises(UserError, match=f"student has finished 12 steps, and .*{reason}"):
        run(longer, resume=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [{"resume": True}, {"resume_from": "step-12"}], ids=["newest", "named"])
def test_fewer_steps_than_are_done_are_refused_before_the_folder_changes(analytic_values: dict, flags: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    output = run(config_of(values)).parent
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    fewer = config_of(values | {"trainer": values["trainer"] | {"max_steps": 8}})
    flags = {key: value is True or output / "checkpoints" / value for key, value in flags.items()}
    with pytest.raises(
        UserError, match=r"max_steps is 8, and \S+step-12 has 12 steps: give --trainer\.max-steps 12 or"
    ):
        run(fewer, **flags)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_resume_of_a_folder_that_is_no_run_is_refused(analytic_values: dict) -> None:
    with pytest.raises(UserError, match="is no run's folder"):
        run(config_of(analytic_values), resume=True)
    assert not Path(analytic_values["output"]).exists()


def test_resume_is_an_error_when_every_checkpoint_is_damaged(analytic_values: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    for step in (6, 12):
        (Path(values["output"]) / "checkpoints" / f"step-{step}" / "shared.json").unlink()
    with pytest.raises(UserError, match=r"(?s)no intact checkpoint.*step-12: shared\.json is missing.*step-6"):
        run(config_of(values), resume=True)


def test_resume_says_what_it_restored_and_which_harmless_fields_changed(analytic_values: dict, capsys) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    longer = values | {"trainer": values["trainer"] | {"max_steps": 14, "log_every": 2}}
    run(config_of(longer), resume=True)
    said = "".join(capsys.readouterr().err.split())
    assert "changedsincestep-12:trainer.log_every:3->2" in said
    assert "trainer.max_steps:12->14" in said
    assert "rolesstudent,critic;dataatepoch0,batch12of16;randomstreams" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed: 0 -> 1"),
        ({"ladder": {"times": [1.0, 0.5]}}, r"ladder\.times: \[1\.0, 0\.75, 0\.5, 0\.25\] -> \[1\.0, 0\.5\]"),
        ({"data": {"prompts": "other.txt", "batch_size": 4}}, r"data\.prompts: .*prompts\.txt -> other\.txt"),
        ({"ema": {"decay": 0.5}}, r"ema\.decay: 0\.98 -> 0\.5"),
    ],
)
def test_resume_refuses_what_would_silently_change_the_run(analytic_values: dict, change: dict, message: str) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    with pytest.raises(UserError, match=message):
        run(config_of(values | change), resume=True)


def test_a_run_goes_on_from_an_earlier_checkpoint_and_keeps_the_later_ones(analytic_values: dict) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    whole = result(values)
    folder = Path(values["output"]) / "checkpoints"
    run(config_of(values), resume_from=folder / "step-6")
    assert sorted(path.name for path in folder.iterdir()) == ["abandoned-step-12", "step-12", "step-6"]
    assert all(torch.equal(tensor, result(values)[name]) for name, tensor in whole.items())


def test_a_checkpoint_of_another_run_is_gone_on_from_in_a_new_folder(analytic_values: dict, tmp_path: Path) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    fork = values | {"output": str(tmp_path / "fork")}
    run(config_of(fork), resume_from=Path(values["output"]) / "checkpoints" / "step-6")
    assert all(torch.equal(tensor, result(fork)[name]) for name, tensor in result(values).items())
    with pytest.raises(UserError, match="holds another run"):
        run(config_of(fork), resume_from=Path(values["output"]) / "checkpoints" / "step-6")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints/step-3", "it does not exist; there are step-6, step-12$"),
        ("", "it is a folder of checkpoints .step-6, step-12.: name one of them, or .* with --resume$"),
        ("checkpoints", "it is a folder of checkpoints .step-6, step-12."),
        ("student", "it is no checkpoint, and holds none$"),
        ("checkpoints/step-12", r"it has no manifest\.json: its save was not finished$"),
    ],
    ids=["absent", "run", "checkpoints", "other", "unfinished"],
)
def test_a_path_that_is_no_checkpoint_is_told_from_an_unfinished_one(
    analytic_values: dict, name: str, message: str
) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    output = run(config_of(values)).parent
    if name.endswith("12"):
        cut_off(values, 12)
    with pytest.raises(UserError, match=f"cannot be used: {message}"):
        run(config_of(values), resume_from=output / name)


RESUMABLE_FIELDS = {
    *("output", "device", "data.cache", "data.long_prompts"),
    *(f"parallel.{name}" for name in ParallelConfig.model_fields),
    *(f"validation.{name}" for name in ValidationConfig.model_fields),
    *(f"health.{name}" for name in HealthConfig.model_fields),
    *(f"tracking.{name}" for name in TrackingConfig.model_fields),
    *(f"checkpoint.{name}" for name in CheckpointConfig.model_fields),
    *("trainer.max_steps", "trainer.max_cpu_seconds", "trainer.log_every", "trainer.threads"),
    *("trainer.keep_freed_memory", "trainer.non_finite", "trainer.max_skips", "trainer.stop_signals"),
    "method.decay_steps",
    *(
        "trainer.watchdog_seconds",
        "trainer.profile",
        "trainer.memory_snapshot",
        "trainer.peak_flops",
        "trainer.slim_result",
    ),
}
"""A decision: a field is named here on purpose, because a run may then go on with another value of it."""


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_marked_as_resumable_or_refused(analytic_values: dict, tmp_path: Path, method: str) -> None:
    """A checkpoint whose config differs in one field: a line for the user if it is marked, else a refusal."""
    config = config_of(analytic_values)
    schema = run_schema("analytic", method)
    keys = set(flat(field_tree(schema)))
    assert {key for key in keys if is_resumable(schema, key)} == RESUMABLE_FIELDS & keys
    if method != config.distill_method:
        return
    saved = config.model_dump(mode="json")
    for key in sorted(flat(saved)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(saved, key.split("."))))
        started = key.endswith(".init_from") and config.roles[key.split(".")[1]].trainable
        if key in RESUMABLE_FIELDS or started:
            assert [line.partition(":")[0] for line in check_config(config, tmp_path)] == [key]
        else:
            with pytest.raises(UserError, match=rf"would change the run silently:\n  {re.escape(key)}: "):
                check_config(config, tmp_path)


def test_a_checkpoint_may_name_a_field_of_an_earlier_version(analytic_values: dict, tmp_path: Path) -> None:
    config = config_of(analytic_values)
    saved = config.model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**saved, "model": saved["model"] | {"prompt_cache": 64}}))
    assert check_config(config, tmp_path) == []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**saved, "model": saved["model"] | {"prompt_chest": 64}}))
    with pytest.raises(UserError, match=r"model\.prompt_chest: 64 -> None"):
        check_config(config, tmp_path)


def field_tree(schema: type[Section]) -> dict[str, Any]:
    """Every field of a schema, nested as its sections are."""
    inner = {name: field.annotation for name, field in schema.model_fields.items()}
    sections = {name: kind for name, kind in inner.items() if isinstance(kind, type) and issubclass(kind, Section)}
    return {name: field_tree(sections[name]) if name in sections else None for name in inner}


def changed(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A copy with another value at one place."""
    rest = keys[1:]
    return {**values, keys[0]: changed(values[keys[0]], rest) if rest else f"not {values[keys[0]]}"}
