"""Teachers in .gguf files: what they hold, their bytes, their error, and what is refused."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvideo.cli import main
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.diffusers import gguf_file
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.quantised_roles import reads_gguf
from fastvideo.distillation.registry import ADAPTERS, load_adapter
from fastvideo.distillation.types import UserError
from fastvideo.planning.fake import fake_run
from fastvideo.planning.layout import role_plans
from fastvideo.tests.distillation.gguf_files import Q6_K, write_gguf
from fastvideo.tests.distillation.test_quantised import ROLES, refusal, values
from fastvideo.tests.distillation.tiny import experts_folder, made_family, wan_config
from fastvideo.training.run import run

package = pytest.mark.skipif(find_spec("gguf") is None, reason="no package gguf")


def mixed(name: str, values: Any) -> str:
    """Eight bits for matrices of blocks, or six where 256 numbers are in a row; the rest as converters leave it."""
    if not name.startswith("blocks.") or values.ndim != 2:
        return "F32" if values.ndim < 2 else "BF16" if name.endswith("scale_shift_table") else "F16"
    return "Q6_K" if values.shape[-1] % Q6_K == 0 else "Q8_0"


@pytest.fixture(scope="module")
def family() -> WanFamily:
    return WanFamily(wan_config(Path("tiny"), height=32, width=32, num_frames=9))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, family: WanFamily) -> Path:
    """The tiny teacher with matrices of eight and six bits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q6_K.gguf"
    kinds = write_gguf(path, family.folder.load_network(), mixed)
    assert {*kinds.values()} == {"F32", "F16", "BF16", "Q8_0", "Q6_K"}
    return path


def of(config: Any) -> Any:
    """The family and method of a config."""
    family = build_adapter(config)
    return family, build_method(config, family)


def held(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters())


@package
@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_file_is_a_teacher_with_nearly_the_same_velocities(
    precision: str, within: float, teacher: Path, tmp_path: Path
) -> None:
    """They are those of its numbers multiplied out."""
    model = {"path": "tiny", "precision": precision}
    config = config_of(values(tmp_path, {"path": str(teacher)}, model=model), "test")
    family, method = of(config)
    network = method.bundle["teacher"].network
    packed = {type(module).__name__ for module in network.modules()}
    assert "GGUFLinear" in packed
    assert not any(p.requires_grad for p in network.parameters())
    out = family.folder.load_network(str(teacher), family.folder.compute_dtype)  # multiplied out
    family.scaling.compute_directly(out)
    x, t = torch.randn(2, *family.codec.latent_shape), torch.tensor([0.4, 0.9])
    condition = family.conditioner.encode_prompts(["a red seven", "a blue two"])
    with torch.no_grad():
        found, same = (family.velocity(n, x, t, condition) for n in (network, out))
    assert (found - same).norm() < within * same.norm()
    exact, read = family.folder.load_network().state_dict(), out.state_dict()
    relative = {name: float((read[name].float() - w).norm() / (w.norm() + 1e-9)) for name, w in exact.items()}
    assert max(relative.values()) < 0.03
    assert min(error for name, error in relative.items() if name.endswith("ffn.net.2.weight")) > 2e-3
    with pytest.raises(UserError, match=r"roles\.teacher\.path: .*a gradient would pass this network"):
        family.velocity(network, x.requires_grad_(), t, condition)


@package
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_plan_counts_the_bytes_of_the_file(precision: str, teacher: Path, tmp_path: Path) -> None:
    made = values(tmp_path, {"path": str(teacher)}, model={"path": "tiny", "precision": precision})
    _, method = of(config_of(made, "test"))
    config = config_of(made | {"parallel": {"shard": 2}}, "test")
    plans = {role.name: role for role in role_plans(fake_run(config, Processes(world_size=2, shard=2)))}
    assert plans["teacher"].weights == held(method.bundle["teacher"].network)
    assert plans["teacher"].weights < 0.5 * 4 * plans["teacher"].parameters


@package
@pytest.mark.slow
def test_fastvideo_plan_counts_the_bytes_of_a_file(
    teacher: Path, family: WanFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    network = of_folder(family.folder).load_gguf(str(teacher), torch.float32, "roles.teacher.path")
    weights = (held(network) + sum(b.nbytes for b in network.buffers())) / 2**20
    recipe = "examples/distillation/tiny_wan_dmd2.yaml"
    assert main(["plan", "--config", recipe, "--roles.teacher.path", str(teacher)]) == 0
    assert weights < 4
    assert re.search(rf"^teacher \(frozen\) +[\d,]+ +{weights:.2f} MiB ", capsys.readouterr().out, re.MULTILINE)


@package
@pytest.mark.slow
def test_a_network_of_another_size_has_its_config_beside_the_file(
    teacher: Path, family: WanFamily, tmp_path: Path
) -> None:
    """A larger teacher, of a student of the size that the model has."""
    from diffusers import WanTransformer3DModel

    large = WanTransformer3DModel.from_config({**family.folder.load_network().config, "num_layers": 5})
    path = tmp_path / "large.gguf"
    write_gguf(path, large, mixed)
    said = refusal(tmp_path, {"path": str(path)})
    assert said.startswith(f"roles.teacher.path: {path}: {path} is no WanTransformer3DModel of this size: ")
    assert "put the config.json of its folder beside the file (its architecture is wan)" in said
    large.save_config(tmp_path)
    config = config_of(values(tmp_path, {"path": str(path)}, trainer={"max_steps": 1}), "test")
    _, method = of(config)
    assert len(method.bundle["teacher"].network.blocks) == 5
    run(config)
    assert "quantised/" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # nothing to compare it with


@package
def test_what_is_no_file_of_the_network_is_refused_before_anything_is_loaded(tmp_path: Path, family: WanFamily) -> None:
    other, broken = tmp_path / "other.gguf", tmp_path / "broken.gguf"
    write_gguf(other, family.folder.load_network().condition_embedder, lambda *_: "F32", "llama", str)
    broken.write_bytes(b"GGUF and nothing else")
    assert "is no WanTransformer3DModel" in (said := refusal(tmp_path, {"path": str(other)}))
    assert said.endswith("(its architecture is llama)")
    assert "cannot be read as a .gguf file" in refusal(tmp_path, {"path": str(broken)})
    flux = made_family("flux", tmp_path / "flux")
    with pytest.raises(UserError, match=r"is no FluxTransformer2DModel: .* cannot convert .*architecture is llama"):
        of_folder(flux.folder).check_gguf(str(other), "roles.teacher.path")
    gone = tmp_path / "gone.gguf"
    assert refusal(tmp_path, {"path": str(gone)}) == f"roles.teacher.path: {gone}: there is no such file"


@package
@pytest.mark.slow
def test_a_run_reports_the_error_and_resumes_to_the_bit(
    teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = values(tmp_path, {"path": str(teacher)}, checkpoint={"every": 2}, validation={"every": 4, "prompts": ["a"]})
    whole = load_file(run(config_of(made, "test")) / "transformer" / "diffusion_pytorch_model.safetensors")
    said = " ".join(capfd.readouterr().err.split())
    assert f"roles.teacher.path: {teacher}: its velocities are off those of the weights of tiny by" in said
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    errors = [value for key, value in first.items() if key.startswith("quantised/")]
    assert len(errors) == 4
    assert all(1e-3 < error < 0.05 for error in errors)
    again = config_of(made | {"output": str(tmp_path / "again")}, "test")
    folder = run(again, resume_from=tmp_path / "run" / "checkpoints" / "step-2")
    second = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in whole.items())


@package
@pytest.mark.slow
def test_fastvideo_merge_makes_a_folder_of_a_file(teacher: Path, family: WanFamily, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert main(["merge", "tiny", "--network", str(teacher), "--out", str(folder)]) == 0
    made, read = (family.folder.load_network(str(path)).state_dict() for path in (folder, teacher))
    assert all(torch.equal(tensor, read[name]) for name, tensor in made.items())


@package
@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen_image", "ltx"])
def test_files_of_other_families_in_their_own_names(name: str, tmp_path: Path) -> None:
    made = made_family(name, tmp_path / name)
    network, path = made.folder.load_network(), tmp_path / "a.gguf"
    eight = lambda key, w: "Q8_0" if key.endswith(".weight") and w.ndim == 2 and w.shape[1] % 32 == 0 else "F32"  # noqa: E731
    assert "Q8_0" in write_gguf(path, network, eight, name, str).values()
    packed = of_folder(made.folder).load_gguf(str(path), torch.float32, "roles.teacher.path")
    x, t = torch.randn(2, *made.codec.latent_shape), torch.tensor([0.4, 0.9])
    condition = made.conditioner.encode_prompts(["a red seven", "a blue two"])
    with torch.no_grad():
        found, exact = (made.velocity(n, x, t, condition) for n in (packed, network))
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


FILE = "teacher-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"critic": {"trainable": True, "path": FILE}}, rf"critic.*`path` {FILE} is for frozen.*weights change"),
        ({"student": {"trainable": True, "lora": {}, "path": FILE}}, "base of an adapter.*fastvideo merge MODEL"),
        ({"teacher": {"trainable": False, "path": FILE, "quantise": "nf4"}}, "nf4: .* is quantised already"),
        ({"teacher": {"trainable": False, "path": FILE, "loras": [{"path": "x"}]}}, "cannot be merged into"),
        ({"teacher": {"trainable": False, "path": FILE, "init_from": "x"}}, f"`init_from` cannot .* `path` {FILE}"),
    ],
)
def test_a_config_takes_files_for_frozen_roles_alone(roles: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"(?s){message}"):
        config_of(values(tmp_path, {}, roles=ROLES | roles), "test")


def test_what_a_file_cannot_be_is_refused_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda package: None)
    file = {"path": FILE}
    assert refusal(tmp_path, file) == (
        f"roles.teacher.path: {FILE}: .gguf files need gguf, which is not installed: "
        "pip install 'fastvideo-distillation[gguf]'"
    )
    heads = {"roles": {**ROLES, "teacher": {"trainable": False, **file}, "discriminator": {"trainable": True}}}
    assert "sends a gradient through the teacher" in refusal(
        tmp_path, file, distill_method="dmd2_gan", method={}, **heads
    )
    assert "parallel.offload: frozen" in refusal(tmp_path, file, parallel={"shard": 2, "offload": "frozen"})
    said = refusal(tmp_path, file, distill_model="cogvideox", model={"path": "tiny_cogvideox"})
    assert said.endswith(
        "of this family; `quantise: nf4` (or int8) stores the matrices of a pipeline folder in as few bits; families "
        "that read such files: wan, qwen_image, z_image, flux2, flux, krea2, sd3, ltx, ltx2"
    )


def test_a_file_is_no_teacher_of_two_experts(tiny_wan: Path) -> None:
    """Said before the package is asked for."""
    folder = experts_folder(tiny_wan.parent)
    with pytest.raises(UserError) as error:
        of_folder(WanFamily(wan_config(folder)).folder).check_gguf(FILE, f"roles.teacher.path: {FILE}")
    assert str(error.value) == (
        f"roles.teacher.path: {FILE}: one file, and {folder} has transformer and transformer_2: give a pipeline folder "
        "with both; `quantise: nf4` (or int8) stores the matrices of a pipeline folder in as few bits"
    )


def test_families_that_read_files_are_those_whose_class_has_a_converter() -> None:
    able = {name for name in ADAPTERS if reads_gguf(load_adapter(name))}
    assert {"wan", "flux2", "qwen_image"} <= able
    assert not able & {"cogvideox", "sdxl", "sd15", "analytic", "hunyuan15", "kandinsky5"}
