"""Two families in one run, each with its text encoder and latent space: a Wan student, CogVideoX teacher and critic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.bridge import LatentBridge
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import same_space
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.tests.distillation.tiny import wan_config, wan_folder
from fastvideo.training.run import run
from fastvideo.training.texts import encode_ahead

PROMPTS = ("a red seven moving left", "a blue three moving up", "a green one", "a red two")
TEACHER = {"family": "cogvideox", "path": "tiny_cogvideox"}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    roles = {"student": {"trainable": True}, "teacher": {"trainable": False, "model": TEACHER}}
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "roles": roles | {"critic": {"trainable": True, "model": TEACHER}},
        "method": {"generator_update_interval": 2, "teacher_guidance": 1.5},
        "data": {"prompts": str(prompts), "batch_size": 2},
        "trainer": {"log_every": 1},
        "tracking": {"backends": []},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_fifty_steps_resume_to_the_bit_and_export(values: dict[str, Any], tmp_path: Path) -> None:
    saving = {"checkpoint": {"every": 25}, "trainer": {"max_steps": 50, "log_every": 1}}
    whole = run(config_of(values | saving, "test"))
    again = config_of(values | saving | {"output": str(tmp_path / "again")}, "test")
    resumed = run(again, resume_from=tmp_path / "run" / "checkpoints" / "step-25")
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["student/grad_norm"] for line in lines if "student/grad_norm" in line]
    assert len(norms) == 25
    assert all(norm > 0 for norm in norms[1:]), "after the first step the critic differs, and gradient crosses"
    assert main(["export", str(whole), "--out", str(tmp_path / "exported")]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", torch_dtype=torch.float32)
    assert type(pipeline).__name__ == "WanPipeline"


def test_scores_live_in_the_teachers_space_and_the_student_gets_their_gradient(values: dict[str, Any]) -> None:
    config = config_of(values, "test")
    method = build_method(config, build_adapter(config))
    student, teacher = method.student.adapter, method.teacher.adapter
    assert teacher is method.critic.adapter
    assert isinstance(method.to_teacher, LatentBridge)
    assert student.codec.latent_key != teacher.codec.latent_key
    batch = BatchPreparer(student.codec, [student.conditioner, teacher.conditioner])(RawBatch(PROMPTS[:2]))
    with torch.no_grad():
        for parameter in method.critic.parameters():
            parameter.mul_(1.01)
    loss = next(method.losses(batch, 0))
    loss.value.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert sum(float(p.grad.abs().sum()) for p in method.student.parameters()) > 0
    assert all(p.grad is None for p in method.critic.parameters())
    for codec in (student.codec, teacher.codec):
        assert all(p.grad is None and not p.requires_grad for p in codec.vae.parameters())


def test_an_autoencoder_that_was_rounded_is_still_the_students_and_another_is_not(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """A VAE that was saved in bfloat16 has another key and the same latents."""
    from diffusers import AutoencoderKLWan

    own = wan_folder(tmp_path)
    options = wan_config(own).model_dump()
    for name, change, way in (("rounded", 1.0, "as they are"), ("other", 1.5, "through pixels, whole videos")):
        copy = shutil.copytree(own, tmp_path / name)
        vae = AutoencoderKLWan.from_pretrained(copy, subfolder="vae")
        vae.encoder.conv_in.weight.data *= change
        vae.bfloat16().save_pretrained(copy / "vae")
        section = {"trainable": False, "model": {**options, "family": "wan", "path": str(copy)}}
        roles = {**values["roles"], "teacher": section, "critic": {**section, "trainable": True}}
        config = config_of(values | {"model": options, "roles": roles}, "test")
        method = build_method(config, build_adapter(config))
        assert method.student.adapter.codec.latent_key != method.teacher.adapter.codec.latent_key
        assert (method.to_teacher is same_space) == (name == "rounded")
        (note,) = method.notes
        assert note.startswith(f"samples reach teacher and critic {way}")
        assert "latents of a clip differ by " in note


def test_bridge_gradient_equals_its_finite_difference(values: dict[str, Any]) -> None:
    """Along one direction, in float64 but for diffusers' float32 upsampling, which sets the step and the tolerance."""
    config = config_of(values, "test")
    method = build_method(config, build_adapter(config))
    for codec in (method.student.adapter.codec, method.teacher.adapter.codec):
        codec.vae.double()
    generator = torch.Generator().manual_seed(2)
    shape = (1, *method.student.adapter.codec.latent_shape)
    x0 = (0.05 * torch.randn(shape, generator=generator)).double().requires_grad_()
    way = torch.randn(shape, generator=generator).double()
    bridged = method.to_teacher(x0)
    weight = torch.randn(bridged.shape, generator=generator).double()
    (gradient,) = torch.autograd.grad((bridged * weight).sum(), x0)
    with torch.no_grad():
        ends = [float((method.to_teacher(x0 + sign * 1e-3 * way) * weight).sum()) for sign in (1, -1)]
    assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-3)


def test_captions_must_be_there_for_the_second_family(values: dict[str, Any]) -> None:
    config = config_of(values, "test")
    method = build_method(config, build_adapter(config))
    student, teacher = method.student.adapter, method.teacher.adapter
    stored = student.conditioner.encode_stored(torch.zeros(2, 3, 9, 32, 32), PROMPTS[:2])
    prepare = BatchPreparer(student.codec, [student.conditioner, teacher.conditioner])
    prepare(RawBatch(PROMPTS[:2], extras={"text_embedding": stored["text_embedding"]}))
    with pytest.raises(UserError, match="a second model family must encode the captions, and a sample has none"):
        prepare(RawBatch((PROMPTS[0], ""), extras={"text_embedding": stored["text_embedding"]}))


def test_captions_that_are_not_there_are_told_before_the_first_step(values: dict[str, Any]) -> None:
    config = config_of(values, "test")
    method = build_method(config, build_adapter(config))
    conditioners = [role.adapter.conditioner for role in (method.student, method.teacher)]
    stored = conditioners[0].encode_stored(torch.zeros(4, 3, 9, 32, 32), PROMPTS)
    data = SampleStream(MemorySource((*PROMPTS[:3], ""), extras=stored), 0, Shard(2))
    with pytest.raises(UserError, match=r"data\.path: 1 of 4 captions of .* are empty, and a second model family must"):
        encode_ahead(config, conditioners, data, 0)
    whole = SampleStream(MemorySource(PROMPTS, extras=stored), 0, Shard(2))
    assert encode_ahead(config, conditioners, whole, 0) == []


def test_unequal_sizes_name_what_to_set(values: dict[str, Any]) -> None:
    roles = {**values["roles"], "teacher": {"trainable": False, "model": {**TEACHER, "height": 16}}}
    roles["critic"] = {"trainable": True, "model": {**TEACHER, "height": 16}}
    config = config_of(values | {"roles": roles}, "test")
    with pytest.raises(UserError, match=r"roles\.teacher\.model: height is 16, the student's is 32"):
        build_method(config, build_adapter(config))


STILLS = {"family": "sdxl", "path": "tiny_stills", "height": 32, "width": 32}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teacher": {"model": STILLS}, "critic": {"model": STILLS}},
            r"roles\.teacher\.model: it makes stills, and the student videos of 9 frames: distill_method: dmd2_frames",
        ),
        (
            {"critic": {}},
            r"roles\.critic\.model: teacher and critic score .*; give the critic the teacher's model section",
        ),
        (
            {"teacher": {"path": "tiny_cogvideox"}, "critic": {}},
            r"roles\.teacher\.path: .*'tiny_cogvideox' holds a CogVideoX.*`model: {family: NAME, path: \.\.\.}`",
        ),
        (
            {"teacher": {"model": {**TEACHER, "height": 40}}},
            r"roles\.teacher\.model: height must be a multiple of 16 \(VAE factor x patch\), such as 32 or 48, got",
        ),
        ({"teacher": {"model": {**TEACHER, "num_frames": 8}}}, "one more than a multiple of 8, such as 9 or 17, got 8"),
        ({"teacher": {"model": {**STILLS, "precision": "float16"}}}, r"precision: .*'bfloat16' \(got 'float16'\)"),
    ],
)
def test_sections_that_do_not_fit_name_the_way_out(
    values: dict[str, Any], sections: dict[str, dict[str, Any]], message: str
) -> None:
    given = {role: {"trainable": role == "critic", **section} for role, section in sections.items()}
    with pytest.raises(UserError, match=message):
        built(values | {"roles": values["roles"] | given})


def built(wanted: dict[str, Any]) -> Any:
    config = config_of(wanted, "test")
    return build_method(config, build_adapter(config))
