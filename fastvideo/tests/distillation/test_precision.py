"""bfloat16: which networks autocast computes, which compute as diffusers does, and dtypes inside."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_method
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.schema import LoRAConfig
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.lora import AdapterSwitch, adapted_layers
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.parity.runs import Case, Result, config_of, role_folders, train, train_alone
from fastvideo.tests.distillation.parity.test_layouts import CHECKPOINTED, LORA
from fastvideo.tests.distillation.tiny import wan_config
from fastvideo.tests.launch import in_world

BFLOAT16 = {"model": {"precision": "bfloat16"}}
LAYOUTS = {"dp2": (1, 1), "context2": (1, 2), "shard2": (2, 1), "shard2 x context2": (2, 2)}
"""Degrees of shard and context of two processes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return role_folders(tmp_path_factory.mktemp("roles"))


def in_layout(folders: Any, cases: list[Case], layout: str, rank: int, size: int) -> list[Result]:
    shard, context = LAYOUTS[layout]
    processes = Processes(rank, size, torch.device("cpu"), shard, context)
    return [train(case, folders, processes) for case in cases]


def similarity(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.mark.usefixtures("cuda_rules")
@pytest.mark.parametrize(
    "layout", ["shard2 x context2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("context2", "shard2"))]
)
def test_layouts_train_in_bfloat16_what_one_process_trains_in_float32(
    layout: str, folders: Any, tmp_path: Path
) -> None:
    shapes = [("wan", {}, {}), ("wan", CHECKPOINTED, LORA), ("cogvideox", {}, {})]
    cases = [Case(family, "dmd2", BFLOAT16 | options, roles) for family, options, roles in shapes]
    ends = in_world(2, partial(in_layout, folders, cases, layout), tmp_path / "world")
    for number, (family, options, roles) in enumerate(shapes):
        expected = train_alone(Case(family, "dmd2", options, roles), folders, 2 // LAYOUTS[layout][1])
        for found in (end[number] for end in ends):
            assert found.losses.keys() == expected.losses.keys()
            for name, loss in expected.losses.items():
                assert found.losses[name] == pytest.approx(loss, rel=0.02, abs=2e-4), name
            for step, gradients in enumerate(expected.gradients):
                large = {name: g for name, g in gradients.items() if g.norm() > 1e-3}
                assert large
                for name, gradient in large.items():
                    assert similarity(found.gradients[step][name], gradient) > 0.98, name


class Seen(nn.Module):
    """Dtypes of the inputs and outputs of some modules."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {name: set() for name in names}
        for path, module in network.named_modules():
            for name in names:
                if path.endswith(name):
                    module.register_forward_hook(partial(self._see, name))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.dtypes[name] |= {value.dtype for value in (*inputs, output) if isinstance(value, Tensor)}


@pytest.fixture
def wan(tiny_wan: Path) -> WanFamily:
    return WanFamily(wan_config(tiny_wan, precision="bfloat16"))


def placed(adapter: WanFamily) -> Placement:
    return Placement(adapter, Processes(), ParallelConfig())


def inputs(adapter: WanFamily) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *adapter.codec.latent_shape, generator=generator)
    return noise, torch.tensor([0.9, 0.3]), adapter.conditioner.encode_prompts(["a green seven", "a red one"])


def test_a_frozen_network_computes_as_diffusers_does_in_bfloat16(wan: WanFamily) -> None:
    network, (x, t, condition) = placed(wan).load(None, trained=False), inputs(wan)
    text = condition.of(wan.conditioner.key)[TEXT].bfloat16()
    seen = Seen(network, "attn1.norm_q", "attn1.to_v", "ffn", "time_embedder")
    found = wan.velocity(network, x, t, condition)
    assert torch.equal(found, network(x.bfloat16(), t * 1000, text).sample.float())
    half = {torch.bfloat16}
    assert seen.dtypes == {"attn1.norm_q": half, "attn1.to_v": half, "ffn": half, "time_embedder": {torch.float32}}


@pytest.mark.usefixtures("cuda_rules")
def test_queries_keys_and_values_have_one_dtype_under_autocast(wan: WanFamily) -> None:
    network, (x, t, condition) = placed(wan).load(None, trained=True), inputs(wan)
    seen = Seen(network, "attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k")
    u = wan.velocity(network, x, t, condition)
    u.square().mean().backward()
    assert all(found == {torch.bfloat16} for found in seen.dtypes.values())
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}


@pytest.fixture
def adapted(wan: WanFamily) -> nn.Module:
    network = placed(wan).load_shared(None, {"student": LoRAConfig(rank=4)}, seed=0)
    for layer in adapted_layers(network):
        nn.init.normal_(layer.lora_B["student"].weight, std=0.1)
    return network


def test_an_adapter_reads_its_layers_input_without_a_copy(wan: WanFamily, adapted: nn.Module) -> None:
    student, (x, t, condition) = Denoiser(wan, adapted, AdapterSwitch(adapted, "student", None)), inputs(wan)
    seen = Seen(adapted, "attn1.to_q.lora_A.student", "ffn.net.2")
    found = student.velocity(x, t, condition)
    assert seen.dtypes == {"attn1.to_q.lora_A.student": {torch.bfloat16}, "ffn.net.2": {torch.bfloat16}}
    for layer in adapted_layers(adapted):
        layer.cast_input_dtype_enabled = True
    assert torch.equal(found, student.velocity(x, t, condition))


@pytest.mark.parametrize(
    ("shard", "lora", "reason"), [(2, None, "parallel.shard 2"), (1, {"rank": 4}, "roles.student.lora")]
)
def test_derivatives_of_rounded_weights_are_refused(shard: int, lora: Any, reason: str, folders: Any) -> None:
    roles = {"student": {"lora": lora}} if lora else {}
    config = config_of(Case("wan", "scm", BFLOAT16, roles, {"jvp": "autodiff"}), folders, {"shard": shard})
    adapter = WanFamily(config.model)
    with pytest.raises(UserError, match=f"with {reason} its weights are bfloat16"):
        build_method(config, adapter, Processes(0, shard, torch.device("cpu"), shard))
