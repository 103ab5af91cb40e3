"""What a model folder says about how it is sampled, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.cli.generate import GenerateArguments, run_generate
from fastvideo.distillation import registry
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.diffusers.pipeline import read_index
from fastvideo.distillation.registry import families, load_adapter
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, prompt_seeds
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.tests.distillation.tiny import FAMILIES, wan_folder
from fastvideo.tiny.paths import PIPELINE_FOLDER

LADDER = [1.0, 0.75, 0.5, 0.25]
MODEL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}


def model(**recipe: Any) -> LoadedModel:
    adapter = AnalyticAdapter(AnalyticConfig())
    return LoadedModel("somewhere", adapter, recipe, adapter.folder.load_network())


def test_student_runs_its_ladder_without_guidance() -> None:
    spec = model(ladder=LADDER, sampler="renoise").sampler()
    assert spec.times == tuple(LADDER)
    assert (spec.kind, spec.guidance, spec.network_calls) == ("renoise", 1.0, 4)


def test_student_in_one_step_runs_the_first_rung() -> None:
    assert model(ladder=LADDER).sampler(steps=1).times == (1.0,)


def test_an_euler_student_walks_its_own_ladder_by_euler() -> None:
    """As a rollout written out here: no noise after the first, no other times."""
    student = model(ladder=[1.0, 0.6, 0.2], sampler="euler", guidance=1.0)
    spec = student.sampler()
    assert (spec.kind, spec.times, spec.guidance) == ("euler", (1.0, 0.6, 0.2), 1.0)
    adapter, prompts = student.adapter, ["0.5", "-1"]
    condition = adapter.conditioner.encode_prompts(prompts)
    noise = SampleNoise(prompt_seeds(7, prompts), adapter.device).draw(adapter.codec.latent_shape)
    expected = euler(lambda x, t: adapter.velocity(student.network, x, t, condition), noise, (1.0, 0.6, 0.2))
    torch.testing.assert_close(sample_latents(adapter, student.denoiser, Sampling(prompts, spec, 7)), expected)


def test_a_flow_map_jumps_in_any_number_of_steps() -> None:
    student = model(ladder=LADDER, sampler="flow_map")
    assert student.sampler().times == tuple(LADDER)
    assert student.sampler(steps=1).times == (1.0,)
    assert student.sampler(steps=5).times == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))
    with pytest.raises(UserError, match="not 5"):
        model(ladder=LADDER, sampler="renoise").sampler(steps=5)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(UserError, match="unknown sampler 'heun', one of renoise, euler, flow_map"):
        model(ladder=LADDER, sampler="heun").sampler()


@pytest.mark.parametrize("steps", [2, 3, 5, 50])
def test_steps_that_are_not_in_the_ladder_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"--steps 4 or --steps 1, not {steps}"):
        model(ladder=LADDER).sampler(steps=steps)


@pytest.mark.parametrize(("family", "guidance"), [("wan", 5.0), ("cogvideox", 6.0), ("analytic", 1.0)])
def test_a_teacher_without_a_recipe_has_the_published_guidance_of_its_family(family: str, guidance: float) -> None:
    teacher = model()
    path = {"wan": "tiny", "cogvideox": "tiny_cogvideox", "analytic": "denoiser"}[family]
    cls = load_adapter(family)
    teacher.adapter.folder.published_guidance = cls(cls.Config(path=path)).folder.published_guidance
    spec = teacher.sampler()
    assert (spec.kind, len(spec.times), spec.guidance) == ("euler", 50, guidance)
    assert spec.network_calls == (50 if guidance == 1.0 else 100)


def test_teacher_with_its_own_guidance() -> None:
    assert model(sampler="euler", guidance=1.5).sampler().guidance == 1.5
    assert model(sampler="euler", guidance=1.5).sampler(guidance=3.0).guidance == 3.0


def test_teacher_with_its_own_steps() -> None:
    assert len(model(sampling_steps=12).sampler().times) == 12
    assert len(model(sampling_steps=12).sampler(steps=25).times) == 25


@pytest.mark.parametrize("steps", [0, 2.5, "many", True])
def test_a_recipe_with_bad_steps_is_refused(steps: object) -> None:
    with pytest.raises(UserError, match=r"recipe\.json: sampling_steps must be a whole number from 1"):
        model(sampling_steps=steps).sampler()


@pytest.mark.parametrize("recipe", [{}, {"ladder": LADDER}])
def test_zero_steps_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="at least 1"):
        model(**recipe).sampler(steps=0)


def test_missing_folder() -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model("./nowhere")


def test_folder_that_is_not_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("call", ["generate FOLDER", "evaluate FOLDER:1 --prompts 8", "live FOLDER --port 0"])
def test_a_runs_folder_in_place_of_its_student(call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model_index.json").touch()
    assert main(call.replace("FOLDER", str(tmp_path)).split()) == 2
    assert f"is a run's folder: give {tmp_path}/student, the model that it made" in capsys.readouterr().err


def test_pipeline_of_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(UserError, match="KolorsPipeline"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{bad", "cannot read .*: Expecting property name"), ("[]", r": a JSON object is expected, found list")],
)
def test_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    for read in (load_model, read_index):
        with pytest.raises(UserError, match=message) as caught:
            read(str(tmp_path))
        assert str(tmp_path / "model_index.json") in str(caught.value)


def test_damaged_recipe(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "recipe.json").write_text('{"ladder": [1.0,')
    with pytest.raises(UserError, match=r"recipe\.json is not valid JSON"):
        load_model(str(tmp_path))


@pytest.fixture
def second_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registered adapter that names a pipeline class."""
    monkeypatch.setattr(AnalyticConfig, "pipelines", ("ToyPipeline",))
    registry._families.cache_clear()
    yield
    registry._families.cache_clear()


@pytest.mark.usefixtures("second_family")
def test_a_registered_family_is_known_by_the_pipelines_it_names(tmp_path: Path) -> None:
    assert families().items() >= {"WanPipeline": "wan", "ToyPipeline": "analytic"}.items()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(UserError, match=r"OtherPipeline.* WanPipeline or .*ToyPipeline"):
        load_model(str(tmp_path))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A Wan pipeline that came from elsewhere: no recipe."""
    shutil.copytree(PIPELINE_FOLDER, tmp_path / "wan", ignore=shutil.ignore_patterns("recipe.json"))
    return tmp_path / "wan"


def test_a_model_of_unknown_size_is_not_sampled_at_the_size_of_the_tiny_world(plain: Path) -> None:
    with pytest.raises(UserError, match=r"give --height, --width, --num-frames, --max-sequence-length \(or"):
        load_model(str(plain))
    with pytest.raises(UserError, match=r"give --num-frames, --max-sequence-length \(or"):
        load_model(str(plain), {"height": 64, "width": 48})


def test_sizes_come_from_options_or_the_recipe(plain: Path) -> None:
    given = load_model(str(plain), {**MODEL, "height": 64, "width": 48})
    assert given.adapter.codec.latent_shape == (16, 3, 8, 6)
    (plain / "recipe.json").write_text(json.dumps({"model": MODEL}))
    assert load_model(str(plain)).adapter.codec.latent_shape == (16, 3, 4, 4)
    assert load_model(str(plain), {"num_frames": 13}).adapter.codec.latent_shape == (16, 4, 4, 4)


def test_a_folder_of_an_earlier_version_loads(plain: Path) -> None:
    (plain / "recipe.json").write_text(json.dumps({"model": MODEL | {"prompt_cache": 64}}))
    assert load_model(str(plain)).adapter.codec.latent_shape == (16, 3, 4, 4)


def test_a_student_is_sampled_with_the_kernels_of_this_machine(plain: Path) -> None:
    trained = {"attention_backend": "_native_cudnn", "compile_blocks": True, "precision": "bfloat16"}
    (plain / "recipe.json").write_text(json.dumps({"model": MODEL | trained}))
    found = load_model(str(plain)).adapter
    assert (found.config.attention_backend, found.config.compile_blocks) == ("native", False)
    assert found.config.precision == "bfloat16"


def test_wrong_option_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "recipe.json").write_text(json.dumps({"model": MODEL}))
    with pytest.raises(UserError, match=r"(?s)of the model in .*height"):
        load_model(str(tmp_path), {"height": 31})


def test_file_name_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"seven\.avi"):
        run_generate(GenerateArguments("./nowhere", "a seven", out=Path("seven.avi")))


def test_a_named_ladder_replaces_the_students_own() -> None:
    student = model(ladder=LADDER, sampler="renoise")
    assert student.sampler(ladder=(1.0, 0.5)) == SamplerSpec((1.0, 0.5), 1.0, "renoise")
    with pytest.raises(UserError, match="not both"):
        student.sampler(2, ladder=(1.0, 0.5))
    with pytest.raises(UserError, match="must decrease"):
        student.sampler(ladder=(0.5, 1.0))
    with pytest.raises(UserError, match="for students"):
        model().sampler(ladder=(1.0, 0.5))


PROMPTS = ["a green seven moving up", "red three"]
SMALL = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}


def bytes_of(model: LoadedModel) -> int:
    return sum(parameter.nbytes for parameter in model.network.parameters())


@torch.no_grad()
def test_wan_in_bfloat16_is_stock_diffusers_in_bfloat16(tmp_path: Path) -> None:
    """To the bit, with half of the memory; its time embedding and norms stay float32."""
    folder = str(wan_folder(tmp_path))
    model, whole = (load_model(folder, {**SMALL, "precision": name}) for name in ("bfloat16", "float32"))
    assert bytes_of(model) < 0.6 * bytes_of(whole)
    assert {parameter.dtype for parameter in whole.network.parameters()} == {torch.float32}
    stock = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    noise, t = normal((2, *model.adapter.codec.latent_shape), seeded(3)), torch.tensor([0.9, 0.4])
    condition = model.adapter.conditioner.encode_prompts(PROMPTS)
    text = condition.of(model.adapter.conditioner.key)["prompt_embeds"].bfloat16()
    (expected,) = stock.eval()(noise.bfloat16(), t * 1000, text, return_dict=False)
    assert torch.equal(model.denoiser.velocity(noise, t, condition), expected.float())


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sdxl", "qwen_image"])
@torch.no_grad()
def test_a_network_in_bfloat16_answers_as_one_in_float32_but_for_rounding(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name].make(tmp_path).config.model_dump(include=set(SMALL) | {"path"})
    found = []
    for precision in ("float32", "bfloat16"):
        model = load_model(config["path"], {**config, "precision": precision})
        noise, prompts = normal((2, *model.adapter.codec.latent_shape), seeded(3)), FAMILIES[name].prompts
        condition = model.adapter.conditioner.encode_prompts(list(prompts))
        found.append(model.denoiser.velocity(noise, torch.tensor([0.9, 0.4]), condition))
        assert str(next(iter(model.adapter.scaling.matrices(model.network).values())).weight.dtype).endswith(precision)
    assert 0 < (found[1] - found[0]).norm() / found[0].norm() < 0.01


def test_generate_takes_a_precision_and_the_recipe_gives_its_own(tmp_path: Path) -> None:
    folder = wan_folder(tmp_path)
    flags = ["--prompt", "red three", "--steps", "2", "--height", "16", "--width", "32", "--frames", "5"]
    flags += ["--max-sequence-length", "8", "--out"]
    for name, extra in {
        "plain": [],
        "float32": ["--precision", "float32"],
        "bfloat16": ["--precision", "bfloat16"],
    }.items():
        assert main(["generate", str(folder), *flags, str(tmp_path / f"{name}.apng"), *extra]) == 0
    (folder / "recipe.json").write_text(json.dumps({"model": {**SMALL, "precision": "bfloat16"}}))
    assert main(["generate", str(folder), *flags, str(tmp_path / "recipe.apng")]) == 0
    made = {name: (tmp_path / f"{name}.apng").read_bytes() for name in ("plain", "float32", "bfloat16", "recipe")}
    assert made["plain"] == made["float32"] != made["bfloat16"] == made["recipe"]


def test_what_is_exported_is_not_rounded_by_the_precision_of_its_recipe(tmp_path: Path) -> None:
    folder, out = wan_folder(tmp_path), tmp_path / "out"
    (folder / "recipe.json").write_text(json.dumps({"model": {**SMALL, "precision": "bfloat16"}, "ladder": LADDER}))
    assert main(["export", str(folder), "--to", "diffusers", "--out", str(out)]) == 0
    own, exported = (load_file(next((place / "transformer").glob("*.safetensors"))) for place in (folder, out))
    assert all(torch.equal(exported[name], value) for name, value in own.items())
