"""What cannot work is refused before anything is loaded: one message, from one process, exit code 2."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvideo.training.distillation as entry
from fastvideo.data.order import Bucket, SampleStream, Shard
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.optional.memory import total_memory
from fastvideo.distillation.engine.parallel.distributed import Processes, check_layout, start_processes
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import UserError
from fastvideo.planning.fake import fake_run
from fastvideo.planning.layout import role_plans
from fastvideo.tests.distillation.tiny import cogvideox_folder, wan_folder
from fastvideo.tests.launch import TRAIN, config_file, ranks, torchrun, wait_until
from fastvideo.training.data import check_buckets

FOLDERS = {"wan": (wan_folder, 5), "cogvideox": (cogvideox_folder, 9)}


def config_of(family: str, root: Path, **parallel: Any) -> Any:
    folder, frames = FOLDERS[family]
    size = {"height": 16, "width": 32, "num_frames": frames, "max_sequence_length": 8}
    roles = {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}}
    values = {
        "distill_model": family, "distill_method": "dmd2", "output": "unused", "method": {}, "roles": roles,
        "model": {"path": str(folder(root)), **size}, "parallel": parallel,
    }  # fmt: skip
    return validate(run_schema(family, "dmd2"), values, "test")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"shard": 4}, r"parallel\.shard: 4 does not divide the number of processes, 6; possible: 1, 2, 3, 6"),
        ({"context": 5}, r"parallel\.context: 5 does not divide the number of processes, 6; possible: 1, 2, 3, 6"),
        ({"shard": 2, "replicate": 2}, "shard 2 x replicate 2 needs 4 processes, there are 6"),
    ],
)
def test_a_layout_that_the_processes_do_not_fit_is_refused(layout: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(6, ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("wan", r"4 does not divide attention heads \(2\) of role 'student'; possible with 4 processes: 1, 2$"),
        ("cogvideox", r"4 does not divide attention heads \(2\) and tokens \(6\) of role 'student'; .*: 1, 2$"),
    ],
)
def test_context_that_divides_neither_heads_nor_tokens_is_refused_before_loading(
    family: str, message: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, tiny_root, context=4)
    adapter = build_adapter(config)
    monkeypatch.setattr(adapter.folder, "load_network", lambda *_: pytest.fail("loaded a network for a wrong layout"))
    with pytest.raises(UserError, match=message):
        build_method(config, adapter, Processes(0, 4, torch.device("cpu"), context=4))


class SeveralSizes:
    """A dataset with buckets; the last one has too few samples for a batch."""

    buckets = (
        Bucket("4x2x2x4", torch.arange(4)),
        Bucket("4x3x2x2", torch.arange(4, 8)),
        Bucket("4x5x2x2", torch.arange(8, 9)),
    )

    def read(self, rows: Any) -> Any:
        return pytest.fail("read a batch that cannot be shared")


def test_context_that_does_not_divide_every_size_of_the_data_is_refused(tiny_root: Path) -> None:
    config = config_of("wan", tiny_root, context=2)
    config = validate(type(config), config.model_dump() | {"data": {"buckets": True}}, "test")
    data = SampleStream(SeveralSizes(), 0, Shard(2))
    adapter, processes = build_adapter(config), Processes(0, 2, torch.device("cpu"), context=2)
    message = r"2 does not divide tokens of 4x3x2x2 \(3\) of role 'student'; possible with 2 processes: 1$"
    with pytest.raises(UserError, match=message):
        check_buckets(config, adapter, processes, data)
    check_buckets(config, adapter, Processes(0, 2, torch.device("cpu")), data)


def need_of(config: Any) -> int:
    """Bytes of weights, gradients and optimizer of all roles on one process, as a plan has them (without tables)."""
    roles = role_plans(fake_run(config))
    return sum(role.weights + role.gradients + role.optimizer for role in roles)


@pytest.mark.parametrize(
    ("world", "share", "hint"),
    [
        (1, 0.9, r"2 such processes with parallel\.shard: 2 would do"),
        (4, 0.9, r"parallel\.shard: 2 would do \("),
        (4, 0.4, r"parallel\.shard: 4 would do \("),
        (4, 0.001, "no number of processes would do"),
    ],
)
def test_roles_that_a_device_does_not_hold_are_refused_before_loading(
    world: int, share: float, hint: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("wan", tiny_root)
    adapter = build_adapter(config)
    for part, loading in ((adapter.folder, "load_network"), (adapter, "ensure_negative_conditioning")):
        monkeypatch.setattr(part, loading, lambda *_: pytest.fail("loaded what does not fit"))
    processes = Processes(0, world, torch.device("cpu"), memory=int(need_of(config) * share))
    roles = r"student \d\.\d\d MiB, critic \d\.\d\d MiB, teacher \d\.\d\d MiB"
    message = rf"shard: 1 does not fit: .*\({roles}\), which has .* MiB on cpu; {hint}.*fastvideo plan"
    with pytest.raises(UserError, match=message):
        build_method(config, adapter, processes)


@pytest.mark.parametrize("changes", [{}, {"trainer": {"optimizer_states": "8bit"}}], ids=["float32", "8bit"])
def test_roles_that_just_fit_are_not_refused(changes: dict[str, Any], tiny_root: Path) -> None:
    if changes:
        pytest.importorskip("torchao")
    config = config_of("wan", tiny_root)
    config = validate(type(config), config.model_dump() | changes, "test")
    build_method(config, build_adapter(config), Processes(memory=need_of(config)))
    with pytest.raises(UserError, match="does not fit"):
        build_method(config, build_adapter(config), Processes(memory=need_of(config) - 1))


def test_a_network_that_roles_share_counts_once(tiny_root: Path) -> None:
    config = config_of("wan", tiny_root)
    lora = {"trainable": True, "lora": {"rank": 2}}
    roles = {"student": lora, "critic": lora, "teacher": {"trainable": False}}
    config = validate(type(config), config.model_dump() | {"roles": roles}, "test")
    adapter = build_adapter(config)
    assert adapter.scaling is not None
    once = sum(p.numel() * p.element_size() for p in adapter.folder.empty(None, torch.float32).parameters())
    assert need_of(config) < 2 * once, "the adapters are small"
    build_method(config, adapter, Processes(memory=need_of(config)))
    roles = r"teacher \d\.\d\d MiB, student \d\.\d\d MiB, critic \d\.\d\d MiB"
    with pytest.raises(UserError, match=rf"on each process \({roles}\), which"):
        build_method(config, adapter, Processes(memory=need_of(config) - 1))


def test_the_memory_of_this_machine_is_known() -> None:
    host = total_memory(torch.device("cpu"))
    assert host is None or host > 2**28
    assert host is None or total_memory(torch.device("cpu"), 4) == host // 4
    assert start_processes("cpu").memory == host


def test_a_family_without_blocks_is_only_run_data_parallel(analytic_values: dict[str, Any]) -> None:
    config = validate(run_schema("analytic", "dmd2"), analytic_values, "test")
    with pytest.raises(UserError, match=r"AnalyticAdapter has no repeated blocks .* only data-parallel runs"):
        build_method(config, build_adapter(config), Processes(0, 2, torch.device("cpu"), shard=2))


def test_offload_without_sharding_is_refused(tiny_root: Path) -> None:
    with pytest.raises(UserError, match=r"parallel: .*offload 'frozen' .* needs shard above 1"):
        config_of("wan", tiny_root, offload="frozen")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda is asked for, and torch sees no CUDA device; use --device cpu, or auto"):
        start_processes("cuda")


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.slow
def test_one_process_says_it_for_all_and_nothing_is_written(analytic_values: dict[str, Any]) -> None:
    """Under torchrun, whose store the processes ask who speaks."""
    flags = ("--config", str(config_file(analytic_values)), "--parallel.shard", "3", "--device", "cpu")
    child = torchrun(2, entry.__file__, *flags)
    assert child.wait() != 0
    assert child.text.count("error: parallel.shard: 3 does not divide the number of processes, 2; possible: 1, 2") == 1
    assert "exitcode  : 2" in child.text
    assert "fastvideo.errors" not in child.text, "a traceback of this code"
    assert not Path(analytic_values["output"]).exists()


DIFFERENT = """
import os, sys
from fastvideo.training.distillation import guarded
steps = "5" if os.environ["RANK"] == "1" else "7"
raise SystemExit(guarded([*sys.argv[1:], "--trainer.max-steps", steps]))
"""


@pytest.mark.slow
def test_processes_with_different_configs_are_refused_at_the_start(
    analytic_values: dict[str, Any], tmp_path: Path
) -> None:
    config, script = config_file(analytic_values | {"device": "cpu"}), tmp_path / "different.py"
    script.write_text(DIFFERENT)
    child = torchrun(2, str(script), "--config", str(config))
    assert child.wait() != 0
    message = "different configs: trainer.max_steps is 7 on rank 0 and 5 on rank 1; start all with the same file"
    assert child.text.count(message) == 1
    assert not Path(analytic_values["output"]).exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_which_names_it_and_goes_on_later(analytic_values: dict[str, Any]) -> None:
    """Both processes are started by hand, so that nothing but this code notices the loss."""
    changes = {"device": "cpu", "checkpoint": {"every": 50}, "parallel": {"timeout": 30.0}}
    values = analytic_values | changes | {"trainer": {"max_steps": 100_000, "log_every": 50}}
    command, checkpoints = [*TRAIN, "--config", str(config_file(values))], Path(values["output"]) / "checkpoints"
    processes = ranks(2, command)
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")))
    processes[1].signal(signal.SIGKILL)
    processes[1].wait(30)
    assert processes[0].wait(60) == 1
    assert processes[0].text.count("error: lost contact with rank 1") == 1
    assert "--resume" in processes[0].text
    newest = max(int(path.parent.name.removeprefix("step-")) for path in checkpoints.glob("step-*/manifest.json"))
    again = ranks(2, [*command, "--resume", "--trainer.max-steps", str(newest + 20)])
    assert [child.wait(120) for child in again] == [0, 0]
    assert f"resumed at step {newest}" in again[0].text
