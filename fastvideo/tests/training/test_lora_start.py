"""Runs that start from LoRA files: a student's adapter, a teacher with a style in it, networks from one file."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo.cli import main
from fastvideo.distillation.adapters.diffusers.single_file import dequantised
from fastvideo.distillation.adapters.export.lora import LAYOUTS
from fastvideo.distillation.builder import build_adapter, build_families, build_method, load_role
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.lora import merge_file, parameter_shapes
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import whole_network
from fastvideo.distillation.lora_file import LoRAFile
from fastvideo.distillation.registry import load_exporter
from fastvideo.errors import UserError
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.launch import in_world
from fastvideo.training.run import run

TARGETS = ("attn1.to_q", "attn2.to_v")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose recipe says its size, and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    copy = folder / "pipeline"
    shutil.copytree(wan_folder(folder), copy)
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    (copy / "recipe.json").write_text(json.dumps({"model": size}))
    return copy


def network_of(base: Path) -> Any:
    return load_model(str(base))


@pytest.fixture(scope="module")
def style(base: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRAFile:
    """A style of rank 2, in ComfyUI's layout."""
    model = network_of(base)
    shapes = parameter_shapes(model.network)
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(tuple(f"{t}.weight" for t in TARGETS))]
    generator = torch.Generator().manual_seed(0)
    factors = {
        layer: (
            torch.randn(2, shapes[f"{layer}.weight"][1], generator=generator),
            torch.randn(shapes[f"{layer}.weight"][0], 2, generator=generator) * 0.1,
        )
        for layer in layers
    }
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_file(LAYOUTS["comfy"].write(factors, load_exporter(model.adapter.config).original_name, "transformer"), file)
    return LoRAFile(file, factors, {})


@pytest.fixture
def values(base: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green seven\nred three\n" * 4)
    lora = {"rank": 4, "targets": list(TARGETS)}
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(base), "height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8},
        "roles": {
            "student": {"trainable": True, "lora": lora},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 4}},
        },
        "ladder": {"times": [1.0, 0.5]},
        "method": {"generator_update_interval": 1},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"max_steps": 2},
        "tracking": {"backends": []},
    }


def built(values: dict[str, Any]) -> Any:
    config = config_of(values, "test")
    return build_method(config, build_adapter(config))


def answer(role: Any) -> torch.Tensor:
    x = torch.randn(1, 4, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    condition = role.adapter.conditioner.encode_prompts(["a green seven"])
    with torch.no_grad():
        return role.velocity(x, torch.tensor([0.6]), condition)


def assert_same(found: Any, wanted: Any) -> None:
    """The same weights to the bit; the answer may be rounded by where in memory a file's tensors lie."""
    weights, others = found.network.state_dict(), wanted.network.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    torch.testing.assert_close(answer(found), answer(wanted), rtol=1e-5, atol=1e-6)


def styled(base: Path, style: LoRAFile, weight: float) -> torch.Tensor:
    model = network_of(base)
    merge_file(model.network, style, weight)
    return answer(model.denoiser)


def test_a_student_starts_from_a_file_and_its_teacher_does_not(
    values: dict[str, Any], base: Path, style: LoRAFile
) -> None:
    values["roles"]["student"]["lora"]["init_from"] = str(style.source)
    bundle = built(values).bundle
    torch.testing.assert_close(answer(bundle["student"]), styled(base, style, 1.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(bundle["teacher"]), answer(network_of(base).denoiser))


@pytest.mark.parametrize("shared", [True, False])
def test_a_teacher_with_a_style(values: dict[str, Any], base: Path, style: LoRAFile, shared: bool) -> None:
    """Roles that name the same files share a network; a student without them keeps its own."""
    loras = [{"path": str(style.source), "weight": 0.5}]
    for role in ("student", "teacher", "critic") if shared else ("teacher",):
        values["roles"][role]["loras"] = loras
    bundle = built(values).bundle
    torch.testing.assert_close(answer(bundle["teacher"]), styled(base, style, 0.5), rtol=1e-4, atol=1e-5)
    assert (bundle["teacher"].network is bundle["student"].network) is shared
    expected = styled(base, style, 0.5 if shared else 0.0)
    torch.testing.assert_close(answer(bundle["student"]), expected, rtol=1e-4, atol=1e-5)


def test_the_result_holds_the_style_that_its_base_had(values: dict[str, Any], style: LoRAFile) -> None:
    """The adapter is merged into the weights that it was trained on; resume and export go on from the same."""
    for role in values["roles"].values():
        role["loras"] = [{"path": str(style.source)}]
    values["roles"]["student"]["lora"]["init_from"] = str(style.source)
    values["checkpoint"] = {"every": 1}
    output = run(config_of(values, "test"))
    config = config_of(values | {"output": str(output.parent.parent / "again")}, "test")
    again = run(config, resume_from=Path(values["output"]) / "checkpoints" / "step-1")
    first, second = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (output, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = network_of(Path(values["model"]["path"])).network.state_dict()
    layer = next(iter(style.factors))
    down, up = style.factors[layer]
    change = first[f"{layer}.weight"] - plain[f"{layer}.weight"]
    # The base's style and the start's, and what two steps at a small rate add.
    torch.testing.assert_close(change, 2 * up @ down, rtol=1e-2, atol=1e-3)


def test_a_resumed_run_reads_no_start_again(values: dict[str, Any], style: LoRAFile, tmp_path: Path) -> None:
    start = Path(shutil.copy(style.source, tmp_path / "start.safetensors"))
    values["roles"]["student"]["lora"]["init_from"] = str(start)
    values |= {"checkpoint": {"every": 1}, "trainer": {"max_steps": 1}}
    run(config_of(values, "test"))
    start.unlink()
    run(config_of(values | {"trainer": {"max_steps": 2}}, "test"), resume=True)


def test_one_start(values: dict[str, Any], style: LoRAFile) -> None:
    values["roles"]["student"] |= {"init_from": str(style.source), "loras": [{"path": str(style.source)}]}
    with pytest.raises(UserError, match="`init_from` replaces the weights that `loras` changes"):
        config_of(values, "test")
    values["roles"]["student"]["loras"] = [{"path": "x", "weight": float("nan")}]
    with pytest.raises(UserError, match="weight"):
        config_of(values, "test")


def fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's scaled fp8: matrices of the blocks with a scale each."""
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if value.ndim == 2 and ".ffn." in name:
            scale = value.abs().max() / 448
            found[name] = (value / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale
        else:
            found[name] = value
    return found


@pytest.fixture(scope="module")
def one_file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in the authors' layout, as `fastvideo export --to comfy` writes it."""
    folder = tmp_path_factory.mktemp("one") / "out"
    assert main(["export", str(base), "--to", "comfy", "--out", str(folder)]) == 0
    return folder / "diffusion_model.safetensors"


def test_a_single_file_is_the_network(values: dict[str, Any], base: Path, one_file: Path, tmp_path: Path) -> None:
    names = load_file(one_file)
    assert "blocks.0.self_attn.q.weight" in names
    values["roles"]["teacher"]["path"] = str(one_file)
    assert_same(built(values).bundle["teacher"], network_of(base).denoiser)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in names.items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    torch.save(names, tmp_path / "original.pth")
    for name in ("prefixed.safetensors", "original.pth"):
        values["roles"]["teacher"]["path"] = str(tmp_path / name)
        assert_same(built(values).bundle["teacher"], network_of(base).denoiser)


def test_an_adapter_over_a_single_file_is_merged_into_it(values: dict[str, Any], base: Path, one_file: Path) -> None:
    """As a run does when it saves its result, after all its steps."""
    for name in ("student", "teacher"):
        values["roles"][name]["path"] = str(one_file)
    student = built(values).bundle["student"]
    whole, own = whole_network(student, student.adapter, Processes()), network_of(base).network.state_dict()
    assert whole is not None
    assert all(torch.equal(value, own[name]) for name, value in whole.state_dict().items()), "a new adapter is nothing"


def test_scaled_fp8_is_read_for_frozen_roles(
    values: dict[str, Any], base: Path, one_file: Path, tmp_path: Path
) -> None:
    save_file(fp8(load_file(one_file)), tmp_path / "fp8.safetensors")
    values["roles"]["teacher"]["path"] = str(tmp_path / "fp8.safetensors")
    found, expected = answer(built(values).bundle["teacher"]), answer(network_of(base).denoiser)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    values["roles"]["student"] = {"trainable": True, "path": str(tmp_path / "fp8.safetensors")}
    with pytest.raises(UserError, match=r"roles\.student\.path: .* holds fp8 weights"):
        built(values)
    values["roles"]["student"]["lora"] = {"rank": 2}
    config = config_of(values, "test")
    families = build_families(config, build_adapter(config), Processes())
    assert load_role(config, families, "student"), "what an export adds an unfinished run's adapter to"


def test_scales_belong_to_rows() -> None:
    """A square weight with a scale for each output: broadcasting alone would scale its inputs."""
    weight, scale = torch.ones(2, 2).to(torch.float8_e4m3fn), torch.tensor([2.0, 3.0])
    for shape in ((2,), (2, 1)):
        found = dequantised(
            "a", {"x.weight": weight, "x.weight_scale": scale.reshape(shape)}, {"x.weight": torch.float32}
        )
        assert found["x.weight"].tolist() == [[2, 2], [3, 3]]
    with pytest.raises(UserError, match=r"a: x\.weight: a scale of shape \(3,\) for \(2, 2\) is not known"):
        dequantised("a", {"x.weight": weight, "x.weight_scale": torch.ones(3)}, {})


def test_single_files_that_do_not_fit(values: dict[str, Any], one_file: Path, tmp_path: Path) -> None:
    names = load_file(one_file)
    bias = names["head.head.bias"]
    changes = {
        "1 missing": {k: v for k, v in names.items() if k != "blocks.0.self_attn.q.weight"},
        "1 unknown": names | {"vace_blocks.0.bias": torch.zeros(1)},
        "1 tensors do not fit": names | {"head.head.bias": torch.zeros(1)},
        r"changed\.safetensors: .* holds int8 numbers": names | {"head.head.bias": bias.to(torch.int8)},
    }
    for message, tensors in changes.items():
        save_file(tensors, tmp_path / "changed.safetensors")
        values["roles"]["teacher"]["path"] = str(tmp_path / "changed.safetensors")
        with pytest.raises(UserError, match=rf"roles\.teacher\.path: .*{message}"):
            built(values)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("{ not json", "is not valid JSON: Expecting property name"),
        ("[]", "an object is expected, found list"),
        ('{"_class_name": "WanTransformer3DModel", "num_layers": "five"}', "diffusers makes no Wan"),
    ],
)
def test_a_broken_config_beside_a_single_file(
    beside: str, message: str, values: dict[str, Any], one_file: Path, tmp_path: Path
) -> None:
    values["roles"]["teacher"]["path"] = str(shutil.copy(one_file, tmp_path / "teacher.safetensors"))
    (tmp_path / "config.json").write_text(beside)
    with pytest.raises(UserError, match=rf"{tmp_path}/config\.json:? .*{message}"):
        built(values)


def test_merge_writes_a_folder(base: Path, style: LoRAFile, one_file: Path, tmp_path: Path) -> None:
    arguments = ["merge", str(base), "--lora", f"{style.source}:0.25", "--lora", str(style.source)]
    assert main([*arguments, "--network", str(one_file), "--out", str(tmp_path / "out")]) == 0
    merged = network_of(tmp_path / "out")
    torch.testing.assert_close(answer(merged.denoiser), styled(base, style, 1.25), rtol=1e-4, atol=1e-5)
    assert merged.recipe["merged"] == [str(one_file), f"{style.source}:0.25", f"{style.source}:1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert main([*arguments, "--out", str(tmp_path / "out"), "--overwrite"]) == 0


def test_a_merge_is_rounded_once_if_it_is_asked_to(
    base: Path, style: LoRAFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states, sizes = [], []
    for options in ([], ["--dtype", "bfloat16"]):
        out = tmp_path / (options or ["float32"])[-1]
        assert main(["merge", str(base), "--lora", str(style.source), "--out", str(out), *options]) == 0
        (file,) = (out / "transformer").glob("*.safetensors")
        states.append(load_file(file))
        sizes.append(file.stat().st_size)
        assert f"; weights in {out.name}, " in capsys.readouterr().out
    whole, rounded = states
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert rounded["blocks.0.ffn.net.0.proj.weight"].dtype == torch.bfloat16
    assert all(torch.equal(value.to(rounded[name].dtype), rounded[name]) for name, value in whole.items())
    assert sizes[1] < 0.65 * sizes[0]


def test_merge_mistakes(base: Path, style: LoRAFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in {
        (): "give --lora FILE[:WEIGHT], or --network FILE",
        ("--lora", f"{style.source}:nan"): "a finite weight is expected",
        ("--lora", "none.safetensors"): "none.safetensors does not exist",
        ("--network", str(base)): "a file of weights",
        ("--network", "none.safetensors"): "'none.safetensors' does not exist: a file of weights",
    }.items():
        assert main(["merge", str(base), *options, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "recipe.json").write_text('{"post_hoc": {}}')
    lora = ["--lora", str(style.source), "--out", str(tmp_path / "used"), "--overwrite"]
    assert main(["merge", str(base), *lora]) == 2
    assert "used is no earlier merge; delete it yourself" in capsys.readouterr().err


def sharded_answer(values: dict[str, Any], rank: int, size: int) -> torch.Tensor:
    config = config_of(values, "test")
    processes = Processes(rank, size, torch.device("cpu"), shard=2)
    role = build_method(config, build_adapter(config, processes), processes).bundle["teacher"]
    return answer(role)


@pytest.mark.slow
def test_split_networks_are_merged_alike(values: dict[str, Any], base: Path, style: LoRAFile, tmp_path: Path) -> None:
    """Two processes that hold half of each weight."""
    for role in values["roles"].values():
        role["loras"] = [{"path": str(style.source)}]
    values["parallel"] = {"shard": 2}
    for found in in_world(2, partial(sharded_answer, values), tmp_path / "world"):
        torch.testing.assert_close(found, styled(base, style, 1.0), rtol=1e-4, atol=1e-5)
