"""Whole runs: folders, results, resume, accumulation, validation, and every kind of bad input."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import RawBatch
from fastvideo.errors import UserError
from fastvideo.tests.preparing import preparer
from fastvideo.training.data import build_data
from fastvideo.training.output import prepare_output
from fastvideo.training.run import run


def config_of(values: dict[str, Any], **changes: Any) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values | changes, "test")


def result(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output"]) / "student" / "network.safetensors")


def test_a_run_leaves_everything_that_is_needed_to_repeat_it(analytic_values: dict) -> None:
    folder = run(config_of(analytic_values))
    output = folder.parent
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert config_of(saved) == config_of(analytic_values)
    assert json.loads((output / "environment.json").read_text())["torch"] == torch.__version__
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["ladder"] == [1.0, 0.75, 0.5, 0.25]
    assert recipe["sampler"] == "renoise"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert "student/loss" in lines[0]
    assert "critic/grad_norm" in lines[0]
    assert list((output / "tensorboard").iterdir())


def test_the_first_step_says_how_long_it_took_to_come(
    analytic_values: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    values = analytic_values | {"checkpoint": {"every": 12}}
    folder = run(config_of(values), began=time.monotonic() - 100.0).parent
    run(config_of(values | {"trainer": {"max_steps": 14, "log_every": 3}}), resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("first step after") == 2
    assert re.search(r"first step after 1\d\d\.\d s \(imports 10\d\.\d, processes \d+\.\d, models ", said)
    lines = [json.loads(line) for line in (folder / "startup.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 13]
    for line in lines:
        assert list(line["parts"]) == ["imports", "processes", "models", "data", "preparation", "step"]
        assert sum(line["parts"].values()) == pytest.approx(line["seconds"], abs=0.01)
    assert lines[0]["parts"]["imports"] >= 100.0 > lines[1]["seconds"]


def test_a_saved_config_reruns_to_the_same_bits(analytic_values: dict, tmp_path: Path) -> None:
    run(config_of(analytic_values))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) | {"output": str(tmp_path / "again")}
    run(config_of(saved))
    first, second = result(analytic_values), result(saved)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_output_folder_that_holds_something_is_left_alone(analytic_values: dict, tmp_path: Path) -> None:
    run(config_of(analytic_values))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"holds another run.*--resume.*--overwrite"):
        run(config_of(analytic_values))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    run(config_of(analytic_values), overwrite=True)


def test_an_empty_name_is_no_folder(analytic_values: dict) -> None:
    with pytest.raises(UserError, match=r"output: .*the name of a folder is expected, such as outputs/mine"):
        config_of(analytic_values | {"output": ""})


def test_overwrite_never_deletes_a_folder_that_is_not_a_run(analytic_values: dict) -> None:
    precious = Path(analytic_values["output"]) / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no run made: choose another with --output$"):
        run(config_of(analytic_values))
    with pytest.raises(UserError, match="not made by a run"):
        run(config_of(analytic_values), overwrite=True)
    assert precious.read_text() == "mine"


def test_accumulated_micro_batches_equal_one_large_batch(analytic_values: dict) -> None:
    """Linear losses aside, the mean over k micro-batches is the loss of one batch k times larger."""
    values = analytic_values | {"distill_method": "sft", "roles": {"student": {"trainable": True}}, "method": {}}
    values["data"] = {}
    latents = torch.linspace(-1, 1, 8 * 16).view(8, 1, 1, 4, 4)
    gradients = []
    for size in (8, 2):
        config = config_of(values)
        adapter = build_adapter(config)
        method = build_method(config, adapter)
        batches = (RawBatch(("0",) * size, part) for part in latents.split(size))
        noise, times = FixedDraws(latents.shape, size), FixedDraws((8,), size)
        method.rng.normal_like = noise.next_like  # type: ignore[method-assign]
        method.times = times.next_times  # type: ignore[attr-defined]
        handle = method.bundle["student"]
        handle.training.step = lambda skip: None  # type: ignore[method-assign]
        options = TrainerConfig(max_steps=1, grad_accumulation=8 // size, max_grad_norm=1e9)
        runtime = Runtime(method, options, Tracker(Path(), enabled=False))
        DistillTrainer(method, preparer(adapter), options, runtime).train_step(batches)
        gradients.append([p.grad.clone() for p in handle.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts)


class FixedDraws:
    """The same draws for a batch of 8, whole or in parts."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.parts = iter(torch.rand(shape, generator=generator).split(size))

    def next_like(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.parts)

    def next_times(self, count: int) -> torch.Tensor:
        return next(self.parts)


def test_overwrite_never_deletes_what_the_run_reads(analytic_values: dict) -> None:
    folder = run(config_of(analytic_values))
    again = config_of(analytic_values, model=analytic_values["model"] | {"path": str(folder)})
    with pytest.raises(UserError, match=r"would delete .*student, which this run reads"):
        run(again, overwrite=True)
    assert (folder / "network.safetensors").is_file()


def test_overwrite_keeps_what_no_run_made(analytic_values: dict, capsys: Any) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}, "ema": {"post_hoc": {"every": 6}}}
    output = run(config_of(values)).parent
    made = {path.name for path in output.iterdir()}
    mine = ("notes.txt", "my.yaml", "my_export/network.safetensors", "videos/a.mp4")
    theirs = ("report.html", "metrics.json", "averaged-0.1/recipe.json", "samples/0a/model.json", ".config.yaml.part")
    for name in (*mine, *theirs):
        (output / name).parent.mkdir(exist_ok=True, parents=True)
        (output / name).write_text(name)
    run(config_of(values | {"trainer": {"max_steps": 2}}), overwrite=True)
    assert {path.name for path in output.iterdir()} == made | {name.partition("/")[0] for name in mine}
    assert all((output / name).read_text() == name for name in mine)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-2"]
    assert "not made by a run: my.yaml, my_export, notes.txt, videos" in " ".join(capsys.readouterr().err.split())


def test_overwrite_deletes_everything_that_a_run_makes(analytic_values: dict) -> None:
    """A run that makes a file of another name must add it to those."""
    values = analytic_values | {"checkpoint": {"every": 6}, "ema": {"post_hoc": {"every": 6}}}
    config = config_of(values)
    output = run(config).parent
    assert prepare_output(config, overwrite=True) == []
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "environment.json"]


def test_overwrite_protects_the_models_that_roles_name(analytic_values: dict) -> None:
    output = run(config_of(analytic_values)).parent
    (output / "validation" / "teacher").mkdir(parents=True)
    model = analytic_values["model"] | {"path": str(output / "validation" / "teacher")}
    roles = analytic_values["roles"] | {"teacher": {"trainable": False, "model": model}}
    with pytest.raises(UserError, match=r"would delete \S+validation/teacher, which this run reads"):
        run(config_of(analytic_values | {"roles": roles}), overwrite=True)


def test_data_order_is_pure_resumable_and_disjoint(analytic_values: dict) -> None:
    source = MemorySource([str(i) for i in range(22)])
    streams = [SampleStream(source, 3, Shard(2, rank, 2)) for rank in (0, 1)]
    epoch = [caption for _ in range(5) for stream in streams for caption in next(stream).captions]
    assert len(set(epoch)) == 20
    resumed = SampleStream(source, 3, Shard(2, 0, 2))
    resumed.load_state_dict(streams[0].state_dict())
    assert next(resumed) == next(streams[0])
    assert streams[0].epoch == 1


def test_prompts_alone_are_refused_where_videos_are_needed(analytic_values: dict) -> None:
    values = analytic_values | {"method": {"rollout": "data"}}
    config = config_of(values)
    with pytest.raises(UserError, match="trains on videos"):
        build_data(config, build_adapter(config), Processes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], "did you mean 'distill'"),
        (["distill", "--config", "absent.yaml"], "absent.yaml: No such file"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: list, message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_of_the_fields_lists_the_values_of_the_file(analytic_values: dict, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(analytic_values))
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--config", str(path), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--method.teacher-guidance" in shown
    assert "--trainer.max-steps" in shown


def test_a_budget_of_cpu_time_ends_a_run_and_not_its_validation(analytic_values: dict, monkeypatch: Any) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("fastvideo.distillation.trainer.time.process_time", lambda: float(next(clock)))
    trainer = {"max_steps": 12, "log_every": 2, "max_cpu_seconds": 4.5}
    folder = run(config_of(analytic_values | {"trainer": trainer}))
    assert json.loads((folder / "recipe.json").read_text())["steps"] == 5, "each step takes one second of that clock"
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["cpu_seconds"]) for line in lines] == [(2, 2.0), (4, 4.0), (5, 5.0)]
