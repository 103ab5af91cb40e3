"""Quantised frozen roles: their bytes, their error, what they refuse, and runs with them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvideo.distillation.adapters.diffusers import packed
from fastvideo.distillation.adapters.diffusers.packed import BLOCK, FLOAT8, PACKAGES, pack, packed_sizes
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import same_space
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.quantised_roles import gradient_roles_of, has_unpacked
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.planning.fake import fake_run
from fastvideo.planning.layout import role_plans
from fastvideo.tests.distillation.tiny import experts_folder, made_family, wan_config
from fastvideo.tests.distillation.toys import SpyAdapter, analytic_batch, toy_method
from fastvideo.tests.preparing import preparer
from fastvideo.training.quantised import velocity_errors
from fastvideo.training.run import run

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(PACKAGES.get(kind, "torch")) is None, reason=f"no {package}"))
    for kind, package in {"fp8_storage": "package", **PACKAGES}.items()
]
WHERE, CPU = "roles.teacher.quantise: nf4", torch.device("cpu")
ROLES = {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}}


def values(folder: Path, teacher: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A DMD2 run of tiny Wan on prompts, with options of its teacher."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red seven moving left\na blue three moving up\n" * 4)
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(folder / "run"),
        "model": {"path": "tiny"},
        "roles": {**ROLES, "teacher": {"trainable": False, **teacher}},
        "method": {"generator_update_interval": 2, "teacher_guidance": 1.5},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 4, "log_every": 1},
        "tracking": {"backends": []},
        **changes,
    }


def refusal(folder: Path, teacher: dict[str, Any], **changes: Any) -> str:
    """The message with which a run is refused before a network is loaded."""
    config = config_of(values(folder, teacher, **changes), "test")
    family = build_adapter(config)
    family.folder.load_network = lambda *_: pytest.fail("loaded a network")  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        build_method(config, family)
    return str(error.value)


def stored(network: nn.Module) -> int:
    """Bytes of everything that a network's parameters hold."""
    found = 0
    for p in network.parameters():
        wrapped = is_traceable_wrapper_subclass(p)  # torchao's int8 matrix
        found += sum(getattr(p, name).nbytes for name in p.__tensor_flatten__()[0]) if wrapped else p.nbytes
        if type(p).__name__ == "Params4bit":
            found += p.quant_state.absmax.nbytes + p.quant_state.code.nbytes
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_holds_the_bytes_that_are_predicted_and_computes_nearly_the_same(kind: Any, precision: str) -> None:
    family = WanFamily(wan_config(Path("tiny"), height=32, width=32, num_frames=9, precision=precision))
    network = family.folder.load_network(None, family.folder.compute_dtype)
    layers = family.scaling.matrices(network)
    assert len(layers) == 4 * 10  # two attentions of four matrices and two of the feed-forward part in each block
    sizes = packed_sizes(layers, kind)
    predicted = sum(sizes.get(p, p.nbytes) for p in network.parameters())
    x, t = torch.randn(2, *family.codec.latent_shape), torch.tensor([0.6, 0.9])
    condition = family.conditioner.encode_prompts(["a red seven", "a blue two"])
    family.scaling.compute_directly(network)
    before = sum(p.nbytes for p in network.parameters())
    with torch.no_grad():
        exact = family.velocity(network, x, t, condition)
        pack(network, layers, kind, CPU, WHERE)
        found = family.velocity(network, x, t, condition)
    assert stored(network) == predicted < (0.65 if precision == "bfloat16" else 0.45) * before
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < {"int8": 0.03, "fp8_storage": 0.08, "nf4": 0.2}[kind]
    with pytest.raises(UserError, match="a gradient would pass this network"):
        family.velocity(network, x.requires_grad_(), t, condition)


def test_sizes_of_a_matrix() -> None:
    """Half a byte and a float32 scale per 64 numbers; a byte, and a scale and a zero per row; a byte."""
    layers = {"one": nn.Linear(100, 7, dtype=torch.bfloat16)}
    matrix, bias = layers["one"].weight, layers["one"].bias
    assert packed_sizes(layers, "nf4") == {matrix: 350 + 4 * 11 + 64}
    assert packed_sizes(layers, "int8") == {matrix: 700 + 5 * 7}
    assert packed_sizes(layers, "fp8_storage") == {matrix: 700, bias: 7}
    assert (BLOCK, FLOAT8.itemsize) == (64, 1)


@pytest.mark.parametrize("name", ["sdxl", "qwen_image", "cogvideox", "experts"])
def test_fp8_storage_leaves_a_family_its_velocity(name: str, tmp_path: Path) -> None:
    """Blocks of a UNet, of two streams, of adaptive norms, and of two experts."""
    if name == "experts":
        family: Any = WanFamily(wan_config(experts_folder(tmp_path)))
    else:
        family = made_family(name, tmp_path)
    network = family.folder.load_network()
    layers = family.scaling.matrices(network)
    assert {part.split(".")[0] for part in layers} >= {"experts": {"transformer", "transformer_2"}}.get(name, set())
    x, t = torch.randn(2, *family.codec.latent_shape), torch.tensor([0.5, 0.95])
    condition = family.conditioner.encode_prompts(["a red seven", "a blue two"])
    with torch.no_grad():
        exact = family.velocity(network, x, t, condition)
        pack(network, layers, "fp8_storage", CPU, WHERE)
        found = family.velocity(network, x, t, condition)
    assert all(layer.weight.dtype == FLOAT8 for layer in layers.values())
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_the_frozen_roles_that_a_gradient_passes(name: str, adapter: SpyAdapter) -> None:
    method, batch = toy_method(name, adapter, mean=-0.5, std=1.2), analytic_batch(adapter, 4)
    for step in range(4):
        for _ in method.losses(batch, step):
            pass
    passed = set()
    for handle in method.bundle:
        calls = [*adapter.of(handle), *(c for c in adapter.feature_calls if c.network is handle.network)]
        if not handle.trainable and any(call.with_grad and call.x_t.requires_grad for call in calls):
            passed.add(handle.name)
    assert set(gradient_roles_of(type(method), method.config)) == passed


def test_a_gan_on_the_critics_features_leaves_the_teacher_without_gradient() -> None:
    method = load_method("dmd2_gan")
    assert gradient_roles_of(method, method.Config(features_of="critic")) == ()
    assert gradient_roles_of(method, method.Config(features_of="teacher")) == ("teacher",)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"critic": {"trainable": True, "quantise": "nf4"}},
            r"critic.*`quantise` nf4 is for frozen.*weights change",
        ),
        ({"critic": {"trainable": True, "lora": {}, "quantise": "nf4"}}, "the base of an adapter passes gradients on"),
        ({"teacher": {"trainable": False, "quantise": "nf4", "init_from": "x"}}, "teacher.*give a model folder"),
        ({"teacher": {"trainable": False, "quantise": "int4"}}, "'int8', 'nf4' or 'fp8_storage'"),
    ],
)
def test_a_config_quantises_frozen_roles_alone(roles: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"(?s){message}"):
        config_of(values(tmp_path, {}, roles=ROLES | roles), "test")


def test_what_cannot_be_quantised_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that gradients pass, one that adapters share, one that stays on the host; a missing package."""
    quantised = {"quantise": "fp8_storage"}
    heads = {"roles": {**ROLES, "teacher": {"trainable": False, **quantised}, "discriminator": {"trainable": True}}}
    said = refusal(tmp_path, quantised, distill_method="dmd2_gan", method={}, **heads)
    assert said.startswith("roles.teacher.quantise: fp8_storage: dmd2_gan sends a gradient through the teacher")
    assert said.endswith("Roles that can be quantised: none; method.features_of: critic reads the critic's instead")
    adapters = {name: {"trainable": True, "lora": {"rank": 2}} for name in ("student", "critic")}
    shared = {"roles": {**adapters, "teacher": {"trainable": False, **quantised}}}
    assert "teacher is the network that critic trains an adapter on" in refusal(tmp_path, quantised, **shared)
    monkeypatch.setattr(packed, "find_spec", lambda package: None)
    for kind, package in PACKAGES.items():
        said = refusal(tmp_path, {"quantise": kind})
        assert said.startswith(f"roles.teacher.quantise: {kind} needs {package}, which is not installed: pip install")
    config = config_of(values(tmp_path, quantised, parallel={"shard": 2, "offload": "frozen"}), "test")
    with pytest.raises(UserError, match=r"roles\.teacher\.quantise: fp8_storage: .* parallel\.offload: frozen"):
        fake_run(config, Processes(world_size=2, shard=2))


def test_an_analytic_teacher_has_nothing_to_quantise(tmp_path: Path) -> None:
    changes = {"distill_model": "analytic", "model": {}, "method": {"teacher_guidance": 1.0}}
    assert "no repeated blocks" in refusal(tmp_path, {"quantise": "fp8_storage"}, **changes)


def test_a_plan_counts_stored_bytes_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process holds a quantised teacher whole, however the others are split."""
    monkeypatch.setattr(packed, "find_spec", lambda package: None)
    layers = WanFamily(wan_config(Path("tiny"))).folder.load_network()
    for kind in ("nf4", "int8", "fp8_storage"):
        config = config_of(values(tmp_path, {"quantise": kind}, parallel={"shard": 2}), "test")
        run_of = fake_run(config, Processes(world_size=2, shard=2))
        teacher = {role.name: role for role in role_plans(run_of)}["teacher"]
        family: Any = run_of.families.by_role["teacher"]
        sizes = packed_sizes(family.scaling.matrices(layers), kind)
        assert teacher.weights == sum(sizes.get(p, p.nbytes) for p in layers.parameters())
        assert teacher.parameters == sum(p.numel() for p in layers.parameters())
        assert (teacher.block, teacher.unpacked) == (0, 192 * 512 * 4)


def test_weights_as_they_were_have_the_size_of_those_that_were_packed(tmp_path: Path) -> None:
    """No network is made to see that."""
    config = config_of(values(tmp_path, {"quantise": "fp8_storage"}), "test")
    family = build_adapter(config)
    family.folder.empty = lambda *_: pytest.fail("made a network")  # type: ignore[attr-defined]
    assert has_unpacked(config, family, "teacher")


@pytest.mark.slow
def test_a_run_reports_the_error_and_resumes_to_the_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a LoRA file merged into the teacher, which belongs to the weights as they were too."""
    lora = tmp_path / "style.safetensors"
    a, b = torch.randn(4, 192), torch.randn(192, 4)
    factors = {"lora_A": a, "lora_B": b}
    save_file({f"transformer.blocks.0.attn1.to_q.{name}.weight": value for name, value in factors.items()}, lora)
    teacher = {"quantise": "fp8_storage", "loras": [{"path": str(lora), "weight": 0.5}]}
    made = values(tmp_path, teacher, checkpoint={"every": 2})
    whole = load_file(run(config_of(made, "test")) / "transformer" / "diffusion_pytorch_model.safetensors")
    said = " ".join(capfd.readouterr().err.split())
    assert "roles.teacher.quantise: fp8_storage: its velocities are off" in said
    assert "WARNING: above 2%" in said
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    errors = {key: value for key, value in first.items() if key.startswith("quantised/")}
    assert list(errors) == [f"quantised/teacher_error_t{t}" for t in (0.2, 0.4, 0.6, 0.8)]
    assert all(0.005 < error < 0.1 for error in errors.values())
    again = config_of(made | {"output": str(tmp_path / "again")}, "test")
    folder = run(again, resume_from=tmp_path / "run" / "checkpoints" / "step-2")
    second = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in whole.items())
    held = tmp_path / "run" / "checkpoints" / "step-2"
    assert not any("teacher" in name for file in held.glob("*.safetensors") for name in load_file(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_errors_rise_with_fewer_bits_and_are_those_of_the_batch(kind: Any, tmp_path: Path) -> None:
    """On latents of the data, and on samples of the teacher where there are none."""
    config = config_of(values(tmp_path, {"quantise": kind}), "test")
    family = build_adapter(config)
    method = build_method(config, family)
    latents = torch.randn(2, *family.codec.latent_shape)
    for x0 in (latents, None):
        batch = preparer(family)(RawBatch(("a red seven", "a blue two"), x0))
        errors = velocity_errors(config, method.bundle["teacher"], batch, same_space)
        low, high = {"int8": (1e-3, 0.03), "fp8_storage": (0.01, 0.1), "nf4": (0.04, 0.4)}[kind]
        assert all(low < error < high for error in errors.values())
