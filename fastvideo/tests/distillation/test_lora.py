"""Roles with adapters over one frozen network: the teacher is the base to the bit, and no role touches another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.lora import AdapterSwitch, adapted_layers
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import whole_network
from fastvideo.distillation.engine.training import tensors_of
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.tests.distillation.tiny import cogvideox_folder, wan_folder
from fastvideo.tests.preparing import preparer

PROMPTS = ("a green seven", "red three moving up")
FOLDERS = {"wan": (wan_folder, 5), "cogvideox": (cogvideox_folder, 9)}


def method_of(
    family: str, root: Path, recompute: str = "none", model: Any = None, path: str | None = None, **student: Any
) -> Any:
    """DMD2 with an adapter for student and critic; ``path`` is that of all roles."""
    folder, frames = FOLDERS[family]
    values = {
        "distill_model": family,
        "distill_method": "dmd2",
        "output": "unused",
        "model": {
            "path": str(folder(root)), "height": 16, "width": 32, "num_frames": frames, "max_sequence_length": 8,
            **(model or {}),
        },
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 4, **student}},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 2, "alpha": 4}},
        },
        "ladder": {"times": [1.0, 0.5]},
        "method": {"generator_update_interval": 1, "student_learning_rate": 1e-2, "critic_learning_rate": 1e-2},
        "parallel": {"activation_checkpointing": recompute},
    }  # fmt: skip
    for role in values["roles"].values():
        role["path"] = path
    config = validate(run_schema(family, "dmd2"), values, "test")
    return build_method(config, build_adapter(config))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks, and warns itself
def test_compiled_blocks_have_a_graph_for_every_role(tmp_path: Path, monkeypatch: Any) -> None:
    counter, compile_ = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_(block, backend=counter))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # torch's own is 8, which a run exceeds
    torch._dynamo.reset()
    method = method_of("wan", tmp_path, model={"compile_blocks": True}, targets=["to_q"])
    x_t, t, condition = inputs(method)
    for handle in method.bundle:
        with torch.no_grad():
            handle.velocity(x_t, t, condition)
    assert counter.frame_count == 3


def inputs(method: Any) -> tuple[Tensor, Tensor, Any]:
    adapter = method.student.adapter
    x_t = torch.randn((2, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(3))
    return x_t, torch.tensor([0.9, 0.3]), adapter.conditioner.encode_prompts(PROMPTS)


def step(method: Any, number: int = 0) -> None:
    for loss in method.losses(preparer(method.student.adapter)(RawBatch(PROMPTS)), number):
        loss.value.backward()
    for role in ("student", "critic"):
        method.bundle[role].training.step()


@pytest.fixture
def method(tiny_wan: Path) -> Any:
    return method_of("wan", tiny_wan.parent)


def test_three_roles_hold_the_base_once(method: Any) -> None:
    bases = {id(handle.network) for handle in method.bundle}
    plain = method.student.adapter.folder.load_network()
    adapters = sum(p.numel() for role in ("student", "critic") for p in method.bundle[role].parameters())
    held = {p for handle in method.bundle for p in handle.network.parameters()}
    assert len(bases) == 1
    assert sum(p.numel() for p in held) == sum(p.numel() for p in plain.parameters()) + adapters
    assert method.teacher.parameters() == []


def test_the_teacher_is_the_base_to_the_bit_at_every_step(method: Any) -> None:
    x_t, t, condition = inputs(method)
    plain, adapter = method.student.adapter.folder.load_network(), method.student.adapter
    expected = adapter.velocity(plain, x_t, t, condition)
    for number in range(3):
        assert torch.equal(method.teacher.velocity(x_t, t, condition), expected)
        step(method, number)
        assert not torch.equal(method.student.velocity(x_t, t, condition), expected)
    assert torch.equal(method.teacher.velocity(x_t, t, condition), expected)


@pytest.mark.parametrize("stepped", ["student", "critic"])
def test_the_step_of_a_role_leaves_the_others_and_the_base_unchanged(method: Any, stepped: str) -> None:
    for loss in method.losses(preparer(method.student.adapter)(RawBatch(PROMPTS)), 0):
        loss.value.backward()
    before = {name: p.detach().clone() for name, p in method.student.network.named_parameters()}
    method.bundle[stepped].training.step()
    after = dict(method.student.network.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if f".{stepped}." in name}


def test_every_adapter_keeps_its_gradient_whichever_role_ran_between_forward_and_backward(method: Any) -> None:
    x_t, t, condition = inputs(method)
    u = method.student.velocity(x_t, t, condition)
    method.critic.velocity(x_t, t, condition)
    method.teacher.velocity(x_t, t, condition)
    u.square().sum().backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert any(p.grad.abs().max() > 0 for p in method.student.parameters())
    assert all(p.grad is None for p in method.critic.parameters())


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_sees_the_adapter_that_forward_saw(kind: str, tiny_wan: Path) -> None:
    gradients = []
    for recompute in ("none", kind):
        method = method_of("wan", tiny_wan.parent, recompute)
        step(method)
        x_t, t, condition = inputs(method)
        u = method.student.velocity(x_t, t, condition)
        method.critic.velocity(x_t, t, condition)
        method.teacher.velocity(x_t, t, condition)
        u.square().sum().backward()
        gradients.append([p.grad for p in method.student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_merged_network_equals_the_forward_with_the_adapter(family: str, tiny_wan: Path) -> None:
    method = method_of(family, tiny_wan.parent)
    for number in range(2):
        step(method, number)
    x_t, t, condition = inputs(method)
    for handle in (method.student, method.critic):
        merged = whole_network(handle, handle.adapter, Processes())
        assert merged is not None
        found, expected = handle.adapter.velocity(merged, x_t, t, condition), handle.velocity(x_t, t, condition)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found - method.teacher.velocity(x_t, t, condition)).abs().max() > 1e-3


def test_the_state_of_a_role_is_its_adapter_alone(method: Any) -> None:
    names = set(tensors_of(method.student))
    blocks, targets = range(2), ("to_q", "to_k", "to_v", "to_out.0")
    assert names == {
        f"blocks.{i}.{attention}.{target}.lora_{ab}.weight"
        for i in blocks for attention in ("attn1", "attn2") for target in targets for ab in "AB"
    }  # fmt: skip
    assert {tuple(t.shape) for n, t in tensors_of(method.student).items() if "lora_A" in n} == {(4, 24)}
    assert tensors_of(method.teacher) == {}


def test_every_run_starts_from_the_same_adapters(tiny_wan: Path) -> None:
    first, second = (tensors_of(method_of("wan", tiny_wan.parent).student) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_target_that_is_no_layer_is_refused_with_those_there_are(tiny_wan: Path) -> None:
    with pytest.raises(UserError, match=r"roles\.student\.lora\.targets: to_query is no linear layer .*attn1\.to_q"):
        method_of("wan", tiny_wan.parent, targets=["to_q", "to_query"])
    with pytest.raises(UserError, match=r"^roles\.student\.lora\.targets: to_query"):
        method_of("wan", tiny_wan.parent, path=str(tiny_wan), targets=["to_q", "to_query"])


def test_a_frozen_role_has_no_adapter(tiny_wan: Path) -> None:
    roles = {"student": {"trainable": False, "lora": {}}}
    values = {"distill_model": "wan", "distill_method": "sft", "output": "x", "model": {}, "method": {}, "roles": roles}
    with pytest.raises(UserError, match=r"roles\.student: .*a frozen role has none"):
        validate(run_schema("wan", "sft"), values, "test")


def test_roles_hold_the_network_itself_and_a_switch(method: Any) -> None:
    assert method.student.network.config.num_layers == 2
    assert adapted_layers(method.student.network)
    assert [handle.select.adapter for handle in method.bundle] == ["student", None, "critic"]
    assert all(isinstance(handle.select, AdapterSwitch) for handle in method.bundle)
