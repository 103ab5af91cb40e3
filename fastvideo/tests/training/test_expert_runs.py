"""Runs on a model of two experts: what is trained, saved and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastvideo.cli import main
from fastvideo.distillation.adapters.export.flow_match import flow_match_sampler
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.runtime import Processes
from fastvideo.distillation.experts import SIDES
from fastvideo.distillation.methods.distribution_matching.phase import boundary_of_phases
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.inference.export import run_export
from fastvideo.inference.loading import load_model
from fastvideo.inference.merge import run_merge
from fastvideo.planning.estimate import Planner
from fastvideo.planning.fake import fake_run
from fastvideo.planning.layout import role_plans
from fastvideo.tests.distillation.tiny import BOUNDARY, experts_folder, wan_folder
from fastvideo.tests.launch import TRAIN, config_file, ranks
from fastvideo.tests.preparing import preparer
from fastvideo.training.run import run

LADDER = (1.0, 0.9375, 5 / 6, 0.625)
"""Uniform, shifted by 5: two steps on either side of the boundary."""
MIDPOINT = (LADDER[1] + LADDER[2]) / 2
SIZE = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
PROMPTS = "a green seven\nred three\n" * 4


def values_of(root: Path, model: Path, **changes: Any) -> dict[str, Any]:
    (root / "prompts.txt").write_text(PROMPTS)
    method = {"generator_update_interval": 1, "student_learning_rate": 3e-2, "critic_learning_rate": 1e-2}
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "device": "cpu",
        "model": {"path": str(model), **SIZE},
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 2, "alpha": 4}},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 2}},
        },
        "ladder": {"times": list(LADDER)},
        "method": {**method, "teacher_guidance": [[BOUNDARY, 4.0], [0, 3.0]], "weight_decay": 0.1},
        "data": {"prompts": str(root / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 6, "log_every": 6},
        "ema": {"enabled": False},
    }
    return {**values, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DMD2 with an adapter on both experts, and a checkpoint."""
    root = tmp_path_factory.mktemp("experts")
    run(config_of(values_of(root, model, checkpoint={"every": 6}), "test"))
    return root / "run"


def changed(student: Path, model: Path, part: str) -> bool:
    """True if a saved expert differs from the model's."""
    name = f"{part}/diffusion_pytorch_model.safetensors"
    with safe_open(student / name, "pt") as own, safe_open(model / name, "pt") as other:
        return any(not torch.equal(own.get_tensor(key), other.get_tensor(key)) for key in other.keys())  # noqa: SIM118


def test_both_experts_are_trained_and_saved_with_the_boundary_between_their_steps(trained: Path, model: Path) -> None:
    student = trained / "student"
    assert json.loads((student / "model_index.json").read_text())["boundary_ratio"] == MIDPOINT
    assert changed(student, model, "transformer")
    assert changed(student, model, "transformer_2")
    assert {file.name for file in student.glob("*.safetensors")} == {
        "high_noise_pytorch_lora_weights.safetensors",
        "low_noise_pytorch_lora_weights.safetensors",
    }


def video(student: Path) -> Tensor:
    """Four Euler steps of the student from seed 2, in [0, 1]."""
    loaded = load_model(str(student), SIZE)
    condition = loaded.adapter.conditioner.encode_prompts(["red three"])
    sampler, shape = SamplerSpec(LADDER, 1.0, "euler"), loaded.adapter.codec.latent_shape
    latents = sample(loaded.denoiser, SampleNoise([2]), shape, sampler, condition)
    return (loaded.adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2


def test_the_two_files_make_the_student_of_the_stock_pipeline(trained: Path, model: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    run_export(str(trained), tmp_path / "lora", to="lora-diffusers")
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for side, second in (("high_noise", False), ("low_noise", True)):
        name = f"{side}_pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=name, load_into_transformer_2=second)
        with safe_open(tmp_path / "lora" / name, "pt") as file:
            assert float(file.metadata()["boundary_ratio"]) == MIDPOINT
    pipeline.scheduler = flow_match_sampler(LADDER, "euler").scheduler
    loaded = load_model(str(model), SIZE)
    noise = SampleNoise([2]).draw(loaded.adapter.codec.latent_shape)
    made = pipeline("red three", latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="pt", **SIZE)[0]
    theirs, ours = made.transpose(1, 2), video(trained / "student")
    assert (ours - theirs).abs().max() <= 2 / 255
    assert (ours - video(model)).abs().max() > 5 / 255
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "load_into_transformer_2=True" in text
    assert f"boundary_ratio={MIDPOINT}" in text


def test_other_programs_get_a_file_per_expert(trained: Path, tmp_path: Path) -> None:
    for to, name in (("lora-comfy", "comfyui_lora"), ("lora-lightx2v", "lightx2v_lora"), ("comfy", "diffusion_model")):
        folder = run_export(str(trained), tmp_path / to, to=to).folder
        assert {f.name for f in folder.glob("*.safetensors")} == {
            f"{side}_{name}.safetensors" for side in ("high_noise", "low_noise")
        }
    text = (tmp_path / "lora-lightx2v" / "README.md").read_text()
    settings = json.loads(text.split("```json")[1].split("```")[0])
    assert settings["boundary_step_index"] == 2
    assert [one["name"] for one in settings["lora_configs"]] == ["high_noise_model", "low_noise_model"]
    with pytest.raises(UserError, match="lora-peft: wan has the layouts lora-diffusers, lora-kohya"):
        run_export(str(trained), tmp_path / "peft", to="lora-peft")


def test_an_exported_folder_samples_as_the_student_does(trained: Path, tmp_path: Path) -> None:
    folder = run_export(str(trained), tmp_path / "out", dtype="float32").folder
    assert json.loads((folder / "model_index.json").read_text())["boundary_ratio"] == MIDPOINT
    torch.testing.assert_close(video(folder), video(trained / "student"), rtol=0, atol=1e-6)


def built(values: dict[str, Any], processes: Processes | None = None) -> Any:
    config = config_of(values, "test")
    return build_method(config, build_adapter(config), processes)


def test_score_times_of_a_step_are_on_one_side_and_follow_the_shifted_distribution(model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, model)
    values["method"] |= {"score_time_shift": 5.0, "score_time_range": [0.0, 1.0]}
    method = built(values)
    drawn = torch.stack([method.score_times(8) for _ in range(1250)])
    high = drawn >= BOUNDARY
    assert (high.all(dim=1) | ~high.any(dim=1)).all()
    u = drawn / (5 - 4 * drawn)  # the shift undone: uniform again
    assert abs(float(high[:, 0].double().mean()) - (1 - BOUNDARY / (5 - 4 * BOUNDARY))) < 0.05
    assert float(drawn[~high].max()) < BOUNDARY - 5e-5
    ranks = u.flatten().sort().values
    assert (ranks - torch.linspace(0, 1, len(ranks))).abs().max() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": {"count": 4, "shift": 7.0}}, r"ladder\.times: the step 0\.875 is exactly the boundary"),
        ({"distill_method": "dmd2_gan"}, "dmd2_gan needs features, which a model of two experts does not have"),
    ],
)
def test_what_two_experts_cannot_do_is_refused_before_loading(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = values_of(tmp_path, model, **changes)
    if changes.get("distill_method") == "dmd2_gan":
        values["roles"]["discriminator"] = {"trainable": True}
        values["method"] = {}
    with pytest.raises(UserError, match=message):
        built(values)


def test_methods_that_mix_noise_levels_are_refused_on_several_processes(model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, model, distill_method="sft", method={})
    values["roles"] = {"student": {"trainable": True}}
    built(values)
    with pytest.raises(
        UserError, match="sft draws a time of its own for every sample, so that 2 processes would call different"
    ):
        built(values, Processes(world_size=2))


def frame_roles(model: dict[str, Any]) -> dict[str, Any]:
    return {role: {"trainable": role == "frame_critic", "model": model} for role in ("frame_teacher", "frame_critic")}


STILLS = {"family": "sdxl", "path": "tiny_stills", "height": 32, "width": 32}


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("dmd2", {"rollout": "data"}, {}),
        ("dmd2_frames", {"rollout": "data", "allow_resize": True}, frame_roles(STILLS)),
        ("rcm", {"jvp": "central_difference"}, {}),
    ],
)
def test_methods_on_noised_data_are_refused_on_several_processes(
    model: Path, tmp_path: Path, name: str, options: dict[str, Any], more: dict[str, Any]
) -> None:
    values = values_of(tmp_path, model, distill_method=name)
    values |= {"method": options, "roles": {**values["roles"], **more}}
    message = rf"^{name} draws .*take dmd2 or .*phased_dmd or dmd2_frames with method\.rollout: simulate"
    with pytest.raises(UserError, match=message):
        built(values, Processes(world_size=2))


def test_phases_on_noised_data_share_their_step(model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, model, distill_method="phased_dmd")
    values["method"] |= {"rollout": "data"}
    built(values, Processes(world_size=2))


def test_frame_roles_of_two_experts_are_refused_on_several_processes(model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, model, distill_method="dmd2_frames", method={})
    values["roles"] |= frame_roles({"family": "wan", "path": str(model), **SIZE, "num_frames": 1})
    with pytest.raises(UserError, match=r"roles\.frame_teacher: .* own, so that 2 processes would call different"):
        built(values, Processes(world_size=2))


def test_both_files_are_read_again_each_for_its_expert(trained: Path, model: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, model)
    values["roles"]["student"]["lora"] |= {"init_from": str(trained / "student")}
    student = built(values).bundle["student"]
    own = {name: value for name, value in student.named_parameters().items() if ".lora_B." in name}
    for part, side in SIDES.items():
        stored = load_file(trained / "student" / f"{side}_pytorch_lora_weights.safetensors")
        for name, value in own.items():
            if name.startswith(f"{part}."):
                found = value * 2.0  # alpha / rank
                torch.testing.assert_close(found, stored[name.replace(f"{part}.", "transformer.", 1)])
    run_merge(str(model), tmp_path / "merged", [str(trained / "student")], None, overwrite=False)
    torch.testing.assert_close(video(tmp_path / "merged"), video(trained / "student"), rtol=0, atol=1e-5)


def merged(model: Path, trained: Path, root: Path, *names: str) -> Path:
    """The model merged with a folder that holds the trained LoRA's files, high noise first, under other names."""
    (root / "lora").mkdir()
    for side, name in zip(["high_noise", "low_noise", "low_noise"], names, strict=False):
        shutil.copy(trained / "student" / f"{side}_pytorch_lora_weights.safetensors", root / "lora" / name)
    run_merge(str(model), root / "merged", [str(root / "lora")], None, overwrite=False)
    return root / "merged"


@pytest.mark.parametrize(
    "names",
    [
        ("lora_high_noise.safetensors", "lora_LOW.safetensors"),
        ("Wan2.2-T2V-HighNoise-slow.safetensors", "Wan2.2-T2V-LowNoise-highres.safetensors"),
    ],
)
def test_a_word_in_any_case_says_which_expert_a_file_is_for(
    trained: Path, model: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    student = merged(model, trained, tmp_path, *names)
    torch.testing.assert_close(video(student), video(trained / "student"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("high_noise.safetensors", "flow.safetensors"),
            r"flow\.safetensors: .* does not say which it is for: high_noise or",
        ),
        (("high_low.safetensors",), r"high_low\.safetensors: .* says both"),
        (
            ("high.safetensors", "a_low.safetensors", "LowNoise.safetensors"),
            r"several files for low_noise: Low.*, a_low",
        ),
        ((), r"lora holds no \.safetensors file"),
    ],
)
def test_every_file_of_a_folder_has_to_name_another_expert(
    trained: Path, model: Path, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        merged(model, trained, tmp_path, *names)
    assert not (tmp_path / "merged").exists()


def test_a_file_that_names_no_expert_is_refused(trained: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "student" / "low_noise_pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors")
    for name, message in (
        ("lora", "name does not say which it is for: high_noise or low_noise"),
        ("no", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            run_merge(str(model), tmp_path / "merged", [str(tmp_path / f"{name}.safetensors")], None, overwrite=False)


@pytest.mark.slow
def test_a_plan_counts_both_experts_and_what_a_call_runs(model: Path, tmp_path: Path) -> None:
    config = config_of(values_of(tmp_path, model, device="auto"), "test")
    plan = Planner().plan(config, 1)
    student = next(role for role in plan.roles if role.holds)
    assert student.whole == 2 * student.called
    with safe_open(model / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        one = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert student.called >= 4 * one
    assert plan.step.calls["student"] > 1


@pytest.mark.parametrize(("side", "idle"), [("low", "transformer"), ("high", "transformer_2")])
def test_the_expert_of_the_other_phase_stays_as_it_is_to_the_bit(
    model: Path, tmp_path: Path, side: str, idle: str
) -> None:
    """Weight decay and averages are on, and one optimizer holds both experts."""
    values = values_of(tmp_path, model, distill_method="phased_dmd", ema={"enabled": True})
    values["roles"] = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
    values["method"] |= {"experts": side}
    values["trainer"] = {"max_steps": 3, "log_every": 3}
    student = run(config_of(values, "test"))
    trained = {"transformer": "transformer_2", "transformer_2": "transformer"}[idle]
    assert not changed(student, model, idle)
    assert changed(student, model, trained)


@pytest.mark.parametrize("option", ["lora.init-from", "init-from", "path"])
def test_the_low_expert_goes_on_from_the_run_of_the_high_one(model: Path, tmp_path: Path, option: str) -> None:
    """The first student's boundary is half-way between two steps, and the teacher's stays where it was."""
    for side, flags in (("high", []), ("low", [f"--roles.student.{option}", str(tmp_path / "high/run/student")])):
        (tmp_path / side).mkdir()
        values = values_of(tmp_path / side, model, distill_method="phased_dmd")
        if not option.startswith("lora"):
            values["roles"] = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
        values["method"] |= {"experts": side}
        values["trainer"] = {"max_steps": 2, "log_every": 2}
        assert main(["distill", "--config", str(config_file(values)), *flags]) == 0
    high, low = (tmp_path / side / "run" / "student" for side in ("high", "low"))
    assert changed(high, model, "transformer")
    assert not changed(high, model, "transformer_2")
    assert changed(low, high, "transformer_2")
    name = "transformer/diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(load_file(low / name), load_file(high / name), rtol=0, atol=1e-6)
    assert json.loads((low / "model_index.json").read_text())["boundary_ratio"] == MIDPOINT


@pytest.mark.parametrize(
    ("student", "given", "ladder", "boundary"),
    [
        (MIDPOINT, None, LADDER, BOUNDARY),
        (MIDPOINT, MIDPOINT, LADDER, BOUNDARY),
        (None, None, LADDER, BOUNDARY),
        (None, 0.9, LADDER, 0.9),
        (0.9, None, (1.0, 0.89, 0.5), 0.9),
        (None, None, (1.0, 0.5, 0.25, 0.1), 0.375),
    ],
)
def test_phases_meet_at_the_teachers_boundary_where_the_students_calls_stay_the_same(
    student: float | None, given: float | None, ladder: tuple[float, ...], boundary: float
) -> None:
    assert boundary_of_phases(student, BOUNDARY, given, ladder) == boundary
    if student is not None:
        with pytest.raises(UserError, match=rf"method\.boundary: 0\.8, but the student's .* {student:g}; leave it out"):
            boundary_of_phases(student, BOUNDARY, 0.8, ladder)


def test_phases_apart_from_the_teachers_experts_are_refused_with_the_way_out(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.7}))
    values = values_of(tmp_path, model, distill_method="phased_dmd")
    values["roles"] = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
    values["roles"]["student"] |= {"path": str(other)}
    with pytest.raises(
        UserError, match=r"at 0\.875, the student's phases at 0\.7; both have to be one: take a ladder without"
    ):
        built(values)
    two = {"model": {"family": "wan", "path": str(model), **SIZE}}
    values = values_of(tmp_path, wan_folder(tmp_path), distill_method="phased_dmd")
    values["roles"] = {"student": {"trainable": True}, "teacher": {"trainable": False, **two}}
    values["roles"]["critic"] = {"trainable": True, **two}
    values["method"] |= {"boundary": 0.9}
    with pytest.raises(UserError, match=r"phases at 0\.9; both have to be one: set method\.boundary: 0\.875"):
        built(values)
    del values["method"]["boundary"]
    assert built(values).boundary == BOUNDARY


@pytest.mark.parametrize("side", ["low", "high", "both"])
def test_a_plan_counts_the_moments_that_a_run_makes(model: Path, tmp_path: Path, side: str) -> None:
    """The expert that no loss reaches has none; of both, each has them after its first turn."""
    values = values_of(tmp_path, model, distill_method="phased_dmd")
    values["roles"] = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
    values["method"] |= {"experts": side, "teacher_guidance": 1.0}
    method = built(values)
    batch = preparer(method.student.adapter)(RawBatch(("red three",)))
    for step in range(2):
        for loss in method.losses(batch, step):
            loss.value.backward()
        for role in method.active_roles(step):
            method.bundle[role].training.step()
    for planned in role_plans(fake_run(config_of(values, "test"))):
        training = method.bundle[planned.name].training
        states = [] if training is None else training.optimizer.state.values()
        assert planned.optimizer == sum(value.nbytes for state in states for value in state.values())
        assert planned.gradients == sum(state["exp_avg"].nbytes for state in states)


@pytest.mark.slow
def test_phases_resume_exactly(model: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    students = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        values = values_of(tmp_path / name, model, distill_method="phased_dmd", checkpoint={"every": 2})
        for stop in stops:
            values["trainer"] = {"max_steps": stop, "log_every": 1}
            students.append(run(config_of(values, "test"), resume=stop != stops[0]))
    assert not changed(students[0], students[2], "transformer")
    assert not changed(students[0], students[2], "transformer_2")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", "phased_dmd"])
def test_processes_that_share_two_experts_call_the_same_one(model: Path, tmp_path: Path, method: str) -> None:
    """Sharded forwards of different experts would hang; each accumulated batch may be another expert's."""
    values = values_of(tmp_path, model, distill_method=method, parallel={"timeout": 60.0, "shard": 2})
    values["trainer"] = {"max_steps": 4, "log_every": 1, "threads": 1, "grad_accumulation": 2}
    values["roles"]["critic"] = {"trainable": True}
    for child in ranks(2, [*TRAIN, "--config", str(config_file(values))]):
        assert child.wait() == 0, child.text[-2000:]
    student = tmp_path / "run" / "student"
    assert json.loads((student / "model_index.json").read_text())["boundary_ratio"] == MIDPOINT
    assert changed(student, model, "transformer") or changed(student, model, "transformer_2")
    assert video(student).isfinite().all()
