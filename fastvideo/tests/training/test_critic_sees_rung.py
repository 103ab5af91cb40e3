"""``method.critic_sees_rung`` in whole runs: which network gets a second time, exact resumption, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.diffusers.flow_map import HEAD, HEAD_FILE, head_of
from fastvideo.distillation.builder import build_adapter, build_method, check_needs
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.runtime import Processes, Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.training.data import build_data
from fastvideo.training.run import build_trainer, run

TOLD = {"critic_sees_rung": True}
ROLES = {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}}


def told(values: dict[str, Any], critic: Path, **changes: Any) -> Any:
    """A run on a Gaussian, whose critic is a network that reads two times."""
    roles = values["roles"] | {"critic": {"trainable": True, "path": str(critic)}}
    whole = values | {"method": values["method"] | TOLD, "roles": roles} | changes
    return validate(run_schema("analytic", "dmd2"), whole, "test")


def wan(tmp_path: Path, **changes: Any) -> Any:
    values = {"distill_model": "wan", "distill_method": "dmd2", "output": str(tmp_path / "run")}
    values |= {"model": {"path": "tiny"}, "roles": ROLES, "method": {**TOLD, "teacher_guidance": 1.5}}
    values |= {"data": {"path": "tiny", "size": 4, "batch_size": 2}, "trainer": {"max_steps": 2}}
    return validate(run_schema("wan", "dmd2"), values | changes, "test")


def test_a_run_goes_on_exactly(analytic_values: dict[str, Any], tmp_path: Path) -> None:
    critic, trainer = tmp_path / "critic", analytic_values["trainer"]
    adapter = AnalyticAdapter(AnalyticConfig(**analytic_values["model"]))
    adapter.folder.save(critic, adapter.folder.load_network("mlp"), {})
    whole = run(told(analytic_values, critic, output=str(tmp_path / "whole")))
    run(told(analytic_values, critic, trainer=trainer | {"max_steps": 7}, checkpoint={"every": 7}))
    resumed = run(told(analytic_values, critic, checkpoint={"every": 7}), resume=True)
    first, second = (load_file(folder / "network.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_critic_alone_gets_a_second_time_and_learns_it(tmp_path: Path) -> None:
    config, processes = wan(tmp_path), Processes()
    adapter = build_adapter(config, processes)
    method = build_method(config, adapter, processes)
    heads = {role: head_of(method.bundle[role].network) for role in ROLES}
    assert heads["critic"] is not None
    assert (heads["student"], heads["teacher"]) == (None, None)
    data, _ = build_data(config, adapter, processes)
    weight = heads["critic"].get_parameter("last.weight")
    assert not weight.any()
    build_trainer(config, adapter, method, Tracker(tmp_path, enabled=False), processes).train_step(data)
    assert weight.any()


def test_the_result_is_the_student_that_stock_tools_load(tmp_path: Path) -> None:
    folder = run(wan(tmp_path))
    assert not list(folder.rglob(HEAD_FILE))
    weights = load_file(next(folder.rglob("diffusion_pytorch_model.safetensors")))
    assert not [name for name in weights if HEAD in name]


def test_a_critic_with_an_adapter_cannot_be_told(tmp_path: Path) -> None:
    critic = {"trainable": True, "lora": {"rank": 4}}
    with pytest.raises(UserError, match=r"roles\.critic\.lora: dmd2 adds a part to the critic and trains it whole"):
        run(wan(tmp_path, roles={**ROLES, "critic": critic}))


def test_families_without_flow_maps_refuse_it_and_say_what_to_leave_out() -> None:
    values = {"distill_model": "ltx2", "distill_method": "dmd2", "output": "x", "roles": ROLES, "method": TOLD}
    with pytest.raises(UserError, match=r"dmd2 needs flow_map .*: leave method\.critic_sees_rung out; families"):
        check_needs(validate(run_schema("ltx2", "dmd2"), values | {"model": {"path": "x"}}, "test"))


def test_the_hint_is_for_what_is_lacking() -> None:
    values = {"distill_model": "sdxl", "distill_method": "self_forcing", "output": "x", "roles": ROLES, "method": TOLD}
    with pytest.raises(UserError, match="self_forcing needs chunks") as refused:
        check_needs(validate(run_schema("sdxl", "self_forcing"), values | {"model": {"path": "x"}}, "test"))
    assert "critic_sees_rung" not in str(refused.value)


def test_a_ladder_of_one_step_has_nothing_to_tell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.critic_sees_rung: a ladder of one step"):
        run(wan(tmp_path, ladder={"times": [1.0]}))
