"""Methods of one's own that are unlike those of the project: a head called critic, a teacher that the run replaces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvideo.conformance.run import conform_method, idle_roles
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.base import MethodConfig, OptimizerConfig, OptimizerOptions
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.copying import copy_role
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.registry import METHODS, run_schema
from fastvideo.distillation.types import Batch, RoleLoss
from fastvideo.errors import UserError
from fastvideo.tests.distillation.tiny import FAMILIES, wan_folder
from fastvideo.tests.distillation.toys import spy
from fastvideo.tests.launch import in_world
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up and left", "a red three"]


class OwnConfig(MethodConfig, OptimizerOptions):
    """No options but the optimizer's."""


class ValueMethod(DistillMethod[OwnConfig]):
    """A Wasserstein game whose value network has the name of DMD's critic."""

    Config = OwnConfig
    trainable_roles = ("student", "critic")
    frozen_roles = ("teacher",)
    sampler = "renoise"
    summary = "a value network called critic"

    @classmethod
    def optimizers(cls, config: OwnConfig) -> Mapping[str, OptimizerConfig]:
        return {role: config.optimizer_of(1e-4) for role in cls.trainable_roles}

    @classmethod
    def uses_latents(cls, config: OwnConfig) -> bool:
        return False

    @classmethod
    def heads(cls, config: OwnConfig, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        return {"critic": nn.Linear(1, 1)}

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        noise = self.rng.normal(batch.shape)
        x0 = self.bundle["student"].x0(noise, full_time(noise, 1.0), batch.condition)
        yield RoleLoss("student", -self.value(x0), frozen=("critic",))
        yield RoleLoss("critic", self.value(x0.detach()))

    def value(self, x0: Tensor) -> Tensor:
        value: Tensor = self.bundle["critic"].network(x0.flatten(1).mean(1, keepdim=True))
        return value.mean()


class RelayMethod(ValueMethod):
    """Progressive distillation at its shortest: the student follows a teacher, and becomes it after two steps."""

    trainable_roles = ("student", "teacher")
    frozen_roles = ()
    summary = "the student is the next teacher"

    @classmethod
    def heads(cls, config: OwnConfig, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        return {}

    def active_roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        student, teacher = self.bundle["student"], self.bundle["teacher"]
        if step == 2:
            copy_role(student, teacher)
        noise = self.rng.normal(batch.shape)
        with torch.no_grad():
            target = teacher.x0(noise, full_time(noise, 0.9), batch.condition)
        x0 = student.x0(noise, full_time(noise, 1.0), batch.condition)
        yield RoleLoss("student", batch.mean((x0 - target).square()))


def test_both_obey_what_every_method_must() -> None:
    for method, idle in ((ValueMethod, []), (RelayMethod, ["teacher"])):
        assert {outcome.result for outcome in conform_method(method, {})} == {"passed"}
        assert idle_roles(method, {}) == idle


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: type[DistillMethod[Any]], **roles: Any) -> Path:
    """The folder of a run of four steps on the tiny model, looked at once."""
    monkeypatch.setitem(METHODS, "own", f"{__name__}:{method.__name__}")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    values = {
        "distill_model": "wan",
        "distill_method": "own",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "roles": {r: {"trainable": r in method.trainable_roles, **roles.get(r, {})} for r in ("student", "teacher")},
        "method": {},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 4, "threads": 1},
        "checkpoint": {"every": 2},
        "validation": {"every": 4, "prompts": PROMPTS},
        "health": {"prompts": 1, "teacher_steps": 2},
    }
    if method is ValueMethod:
        values["roles"]["critic"] = {"trainable": True}
    run(validate(run_schema("wan", "own"), values, "test"))
    return tmp_path / "run"


def test_a_head_called_critic_is_no_critic_to_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(tmp_path, monkeypatch, ValueMethod)
    (line,) = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    assert line["training"].keys() == {"student_movement", "critic_movement"}
    assert "teacher" in line


def test_a_teacher_that_the_run_replaces_is_in_its_checkpoints_and_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, monkeypatch, RelayMethod)
    (line,) = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    assert "teacher" not in line
    stored = [load_file(folder / "checkpoints" / f"step-{n}" / "process-0.safetensors") for n in (2, 4)]
    name = next(key for key in stored[0] if "student::network" in key and "attn1.to_q.weight" in key)
    assert torch.equal(stored[1][name.replace("student", "teacher", 1)], stored[0][name])
    assert not torch.equal(stored[0][name.replace("student", "teacher", 1)], stored[0][name])


def test_copies_that_would_be_lost_or_swap_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = [RoleHandle(name, spy(), nn.Linear(2, 2), trainable=name != "teacher") for name in ("student", "teacher")]
    with pytest.raises(UserError, match="copy of role 'student' to 'teacher': teacher is frozen, and no checkpoint"):
        copy_role(*roles)
    with pytest.raises(UserError, match=r"differ in 2 tensors, such as bias"):
        copy_role(roles[0], RoleHandle("teacher", spy(), nn.Linear(3, 3), trainable=True))
    lora = {"rank": 2, "targets": ["to_q"]}
    with pytest.raises(
        UserError, match=r"student trains a LoRA adapter, and teacher a whole network; .*roles\.teacher"
    ):
        trained(tmp_path, monkeypatch, RelayMethod, student={"lora": lora})


def test_adapters_on_one_network_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"lora": {"rank": 2, "targets": ["to_q"]}}
    folder = trained(tmp_path, monkeypatch, RelayMethod, student=lora, teacher=lora)
    stored = [load_file(folder / "checkpoints" / f"step-{n}" / "process-0.safetensors") for n in (2, 4)]
    names = [key for key in stored[0] if "student::network" in key]
    assert names
    assert all(torch.equal(stored[1][key.replace("student", "teacher", 1)], stored[0][key]) for key in names)


def copied(rank: int, size: int, folder: Path) -> list[bool]:
    """Whether a student, gathered by a call, is its teacher after a copy: of whole networks, and of parameters."""
    family, found = FAMILIES["wan"].make(folder), []
    layout = ParallelConfig(shard=size, keep_gathered="all")
    placement = Placement(family, Processes(rank=rank, world_size=size, shard=size), layout)
    for shares in (False, True):
        networks = [placement.load(None, trained=True) for _ in range(2)]
        own = [dict(network.named_parameters()) if shares else None for network in networks]
        student, teacher = (RoleHandle("r", family, n, True, trained=t) for n, t in zip(networks, own, strict=True))
        x_t, condition = torch.ones(1, *family.codec.latent_shape), family.conditioner.encode_prompts(["a red three"])
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(0.1)
            before = [role.velocity(x_t, torch.tensor([0.5]), condition) for role in (student, teacher)]
            copy_role(student, teacher)
            after = teacher.velocity(x_t, torch.tensor([0.5]), condition)
        found.append(torch.equal(after, before[0]) and not torch.equal(*before))
    return found


@pytest.mark.slow
def test_shards_are_copied(tmp_path: Path) -> None:
    assert in_world(2, partial(copied, folder=wan_folder(tmp_path).parent), tmp_path / "world") == [[True, True]] * 2
