"""SDXL and Stable Diffusion: equal to stock diffusers, exact on their noise levels, and trained by every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid
from fastvideo.distillation.adapters.export.lora import LAYOUTS, read_lora
from fastvideo.distillation.builder import build_method, lacks
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.noise import add_noise, expand_time, velocity_to_x0
from fastvideo.distillation.registry import METHODS, load_adapter, load_exporter, load_method, run_schema
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.inference.export import run_export
from fastvideo.inference.loading import load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.planning.published import architecture_folder
from fastvideo.tests.distillation.tiny import made_family
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up", "red three"]
CLOSE = 1e-5
"""Largest difference of a pixel in [0, 1]."""
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def rescheduled(name: str, root: Path, folder: Path, **changes: Any) -> DistillAdapter[Any]:
    """The tiny family with another scheduler's config."""
    source = Path(made_family(name, root).config.path)
    shutil.copytree(source, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return made_family(name, root, path=str(folder))


@pytest.fixture(params=["sdxl", "sd15", "sd15 v"])
def adapter(request: pytest.FixtureRequest, tiny_wan: Path, tmp_path: Path) -> DistillAdapter[Any]:
    name, _, v = request.param.partition(" ")
    return rescheduled(name, tiny_wan.parent, tmp_path / "v", **V) if v else made_family(name, tiny_wan.parent)


@pytest.fixture
def sdxl(tiny_wan: Path) -> Any:
    return made_family("sdxl", tiny_wan.parent)


def stock_images(adapter: DistillAdapter[Any], folder: Path, noise: Tensor, guidance: float, **options: Any) -> Tensor:
    """What the stock pipeline makes of the prompts in four steps, in [0, 1]."""
    from diffusers import DiffusionPipeline

    stock = load_exporter(adapter.config).stock_sampler([1.0] * 4, "euler")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = stock.scheduler
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": adapter.config.height, "width": adapter.config.width}
    made: Tensor = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance, latents=noise.squeeze(2), output_type="pt",
        **size, **options,
    )[0]  # fmt: skip
    return made


@pytest.mark.parametrize("guidance", [3.5, 7.0])
@torch.no_grad()
def test_four_guided_steps_give_the_pictures_of_the_stock_pipeline(
    adapter: DistillAdapter[Any], guidance: float
) -> None:
    adapter.ensure_negative_conditioning()
    noise, role = (
        normal((2, *adapter.codec.latent_shape), seeded(6)),
        RoleHandle("teacher", adapter, network_of(adapter)),
    )
    times = load_exporter(adapter.config).stock_sampler([1.0] * 4, "euler").times
    condition, negative = adapter.conditioner.encode_prompts(PROMPTS), adapter.conditioner.negative(2)
    latents = euler(lambda x, t, r=None: role.guided_velocity(x, t, condition, negative, guidance), noise, times)
    ours = (adapter.codec.decode(latents).clamp(-1, 1).squeeze(2) + 1) / 2
    theirs = stock_images(adapter, Path(adapter.config.path), noise, guidance)
    assert float((ours - theirs).abs().max()) <= CLOSE


def network_of(adapter: DistillAdapter[Any]) -> nn.Module:
    return adapter.folder.load_network()


def test_another_size_gives_other_numbers_to_the_network(sdxl: Any, tiny_wan: Path) -> None:
    seen: list[Tensor] = []
    network = network_of(sdxl)
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    condition = sdxl.conditioner.encode_prompts(PROMPTS)
    for size in ((8, 16), (16, 16)):
        sdxl.velocity(network, torch.zeros(2, 4, 1, *size), torch.full((2,), 0.5), condition)
    assert [one[1].tolist() for one in seen] == [[16, 32, 0, 0, 16, 32], [32, 32, 0, 0, 32, 32]]


def test_an_empty_negative_prompt_is_what_the_stock_pipeline_takes_without_one(adapter: DistillAdapter[Any]) -> None:
    """SDXL's index asks for zeros, Stable Diffusion encodes the empty text; another text is encoded by both."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(adapter.config.path)
    found = adapter.conditioner.encode_prompts(["", "blurry"]).of(adapter.conditioner.key)
    negatives = [pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                 negative_prompt=negative)[1::2] for negative in (None, "blurry")]  # fmt: skip
    for row, negative in enumerate(negatives):
        for mine, theirs in zip(found.values(), negative, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-5, atol=1e-6)


def test_the_noise_levels_are_the_published_ones(sdxl: Any) -> None:
    """The 4-step ladder of DMD2's SDXL, timesteps 999, 749, 499, 249, worked out by hand."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    sigma, alpha = (1 - abar).sqrt(), abar.sqrt()
    torch.testing.assert_close(sdxl.folder.grid.times, sigma / (alpha + sigma), rtol=0, atol=2e-6)
    assert sdxl.folder.grid.noisiest == pytest.approx(0.9360, abs=1e-4)
    assert load_exporter(sdxl.config).stock_sampler([1.0] * 4, "euler").times == pytest.approx(
        (0.936, 0.803, 0.617, 0.409), abs=1e-3
    )


@pytest.mark.parametrize("steps", [4, 28, 50])
def test_a_teacher_is_called_where_the_stock_pipeline_calls_it(sdxl: Any, steps: int) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_pretrained(sdxl.config.path, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    times = torch.tensor(sdxl.folder.teacher_times(steps))
    assert type(sdxl).network_time(times, sdxl.config).tolist() == scheduler.timesteps.tolist()


class Truth(nn.Module):
    """Knows the sample: predicts its noise or v."""

    def __init__(self, adapter: DistillAdapter[Any], x0: Tensor, noise: Tensor, t: Tensor) -> None:
        super().__init__()
        self.config = network_of(adapter).config
        grid: NoiseGrid = adapter.folder.grid  # type: ignore[attr-defined]
        length = torch.hypot(1 - t, t)
        alpha, sigma = (expand_time(c / length, x0) for c in (1 - t, t))
        self.answer = noise if grid.prediction == "epsilon" else alpha * noise - sigma * x0

    def forward(self, *given: Any, **options: Any) -> tuple[Tensor]:
        return (self.answer.squeeze(2),)


def test_a_network_that_knows_the_sample_comes_out_as_noise_minus_data(adapter: DistillAdapter[Any]) -> None:
    x0, noise = (normal((5, *adapter.codec.latent_shape), seeded(seed)) for seed in (1, 2))
    t = torch.tensor([0.0, 0.01, 0.3, 0.7, 0.935])
    u = adapter.velocity(
        Truth(adapter, x0, noise, t), add_noise(x0, noise, t), t, adapter.conditioner.encode_prompts(["a"] * 5)
    )
    torch.testing.assert_close(u, noise - x0, rtol=1e-4, atol=1e-4)


def test_above_the_noisiest_level_pure_noise_means_what_it_means_to_the_stock_pipeline(sdxl: Any) -> None:
    """At t = 1 the clean estimate is that of the same noise at the last timestep; nothing jumps on the way there."""
    network, noise = network_of(sdxl), normal((2, *sdxl.codec.latent_shape), seeded(3))
    condition, last = sdxl.conditioner.encode_prompts(PROMPTS), sdxl.folder.grid.noisiest
    estimates = []
    for time in (1.0, last + 1e-4, last):
        t = torch.full((2,), time)
        x_t = noise * torch.hypot(1 - t, t).view(-1, 1, 1, 1, 1)
        estimates.append(velocity_to_x0(x_t, sdxl.velocity(network, x_t, t, condition), t))
    for estimate in estimates[:2]:
        torch.testing.assert_close(estimate, estimates[2], rtol=1e-3, atol=1e-3)


def test_stored_texts_hold_tokens_and_pooled_text(sdxl: Any) -> None:
    conditioner = sdxl.conditioner
    stored = conditioner.encode_stored(torch.zeros(2, 3, 1, 16, 32), PROMPTS)
    wanted = conditioner.encode_prompts(PROMPTS).of(conditioner.key)
    assert {name: tuple(value.shape) for name, value in wanted.items()} == {
        "prompt_embeds": (2, 8, 64),
        "pooled_prompt_embeds": (2, 32),
    }
    found = conditioner.text_of(RawBatch(tuple(PROMPTS), None, dict(stored))).of(conditioner.key)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    with pytest.raises(UserError, match="text_embedding has 7 rows, the model expects 9"):
        conditioner.text_of(RawBatch(tuple(PROMPTS), None, {"text_embedding": stored["text_embedding"][:, :7]}))


def test_the_encoders_are_freed_and_come_back(sdxl: Any) -> None:
    first = sdxl.conditioner.encode_prompts(PROMPTS)
    assert sdxl.conditioner.encoder_bytes > 0
    sdxl.conditioner.release_encoder()
    assert sdxl.conditioner.encoder_bytes == 0
    assert sdxl.conditioner.missing_texts([*PROMPTS, "up"]) == ["up"]
    key = sdxl.conditioner.key
    assert torch.equal(
        sdxl.conditioner.encode_prompts(PROMPTS).of(key)["prompt_embeds"], first.of(key)["prompt_embeds"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 9}, "num_frames must be 1: the family makes images, got 9"),
        ({"height": 12}, "height must be a multiple of 8"),
    ],
)
def test_sizes_that_no_picture_has_are_refused(sdxl: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(type(sdxl.config), {"path": sdxl.config.path, **options}, "test")


def test_prompts_are_counted_by_both_tokenizers_and_long_ones_refused(tiny_wan: Path, sdxl: Any) -> None:
    with pytest.raises(UserError, match="prompt has 10 tokens, the text encoder takes 8"):
        sdxl.conditioner.encode_prompts(["a green red seven three moving up left blurry"])
    other = made_family("sdxl", tiny_wan.parent, max_sequence_length=77)
    with pytest.raises(UserError, match=r"max_sequence_length is 77, the tokenizer of .* to 8 tokens"):
        other.conditioner.encode_prompts(PROMPTS)


def test_noise_prediction_on_a_table_that_ends_in_pure_noise_is_refused(tiny_wan: Path, tmp_path: Path) -> None:
    adapter = rescheduled("sd15", tiny_wan.parent, tmp_path / "other", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="prediction_type is epsilon on a table that ends in pure noise"):
        adapter.folder.teacher_times(4)


TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@torch.no_grad()
def test_a_lora_file_changes_the_stock_pipeline_as_it_changes_our_network(
    name: str, layout: str, tiny_wan: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    adapter = made_family(name, tiny_wan.parent)
    network, exporter = network_of(adapter), load_exporter(adapter.config)
    layers = {key: m for key, m in network.named_modules() if isinstance(m, nn.Linear) and key.endswith(TARGETS)}
    stream = seeded(4)
    factors = {
        key: (normal((2, m.in_features), stream), 0.3 * normal((m.out_features, 2), stream))
        for key, m in layers.items()
    }
    own = LAYOUTS[layout]
    save_file(own.write(factors, exporter.original_name, exporter.network_part), tmp_path / own.file)
    found = read_lora(tmp_path, {k: tuple(v.shape) for k, v in network.named_parameters()}, exporter)
    assert found.factors.keys() == factors.keys()
    pipeline = DiffusionPipeline.from_pretrained(adapter.config.path)
    before = pipeline.unet.state_dict()
    pipeline.load_lora_weights(tmp_path, weight_name=own.file)
    noise = normal((1, *adapter.codec.latent_shape), seeded(6))
    given = adapter.conditioner.encode_prompts(PROMPTS[:1])
    bare = adapter.velocity(network, noise, torch.tensor([0.5]), given)
    for key, (down, up) in factors.items():
        layers[key].weight += up @ down
    merged = adapter.velocity(network, noise, torch.tensor([0.5]), given)
    stock = adapter.velocity(pipeline.unet, noise, torch.tensor([0.5]), given)
    assert before.keys() == network.state_dict().keys()
    assert float((merged - bare).abs().max()) > 0.01
    torch.testing.assert_close(stock, merged, rtol=1e-4, atol=1e-4)


def kohya(*layers: str, **options: Any) -> dict[str, Tensor]:
    """An adapter as kohya's scripts write it, for layers of 16 channels."""
    found = {f"lora_unet_{layer}.lora_down.weight": torch.ones(2, 16) for layer in layers}
    return found | {f"lora_unet_{layer}.lora_up.weight": torch.ones(16, 2) for layer in layers} | options


def test_kohyas_files_name_layers_of_sdxl_as_stability_does(sdxl: Any, tmp_path: Path) -> None:
    """A golden name on the way down, one in the middle and one on the way up; diffusers' own names are read too."""
    golden = {
        "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "middle_block_1_transformer_blocks_0_attn1_to_v": "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
        "output_blocks_1_1_proj_in": "up_blocks.0.attentions.1.proj_in",
        "up_blocks_0_attentions_0_proj_out": "up_blocks.0.attentions.0.proj_out",
    }
    shapes = {name: tuple(p.shape) for name, p in network_of(sdxl).named_parameters()}
    exporter, file = load_exporter(sdxl.config), tmp_path / "style.safetensors"
    save_file(kohya(*golden), file)
    assert set(read_lora(file, shapes, exporter).factors) == {*golden.values()}
    save_file(kohya(*golden, lora_te1_text_model_encoder_layers_0_mlp_fc1_alpha=torch.ones(1)), file)
    with pytest.raises(UserError, match=r"1 of its tensors .* text encoders stay .*pipe\.fuse_lora\(\)"):
        read_lora(file, shapes, exporter)
    save_file(kohya(*golden, "input_blocks_9_1_proj_in", lora_te1_layers_0_alpha=torch.ones(1)), file)
    with pytest.raises(UserError, match=r"3 of its tensors .*input_blocks_9_1_proj_in(?!.*text encoders)"):
        read_lora(file, shapes, exporter)


def test_an_adapters_file_has_the_pipelines_name_of_the_network(sdxl: Any, tmp_path: Path) -> None:
    student = run(config_of("sdxl", "dmd2", sdxl.config.path, tmp_path, lora={"rank": 2}))
    names = load_file(student / "pytorch_lora_weights.safetensors")
    assert names
    assert all(name.startswith("unet.") for name in names)
    with pytest.raises(UserError, match="lora-comfy: sdxl has the layouts lora-diffusers, lora-peft, lora-kohya"):
        run_export(str(tmp_path / "run"), tmp_path / "out", to="lora-comfy")


def config_of(family: str, name: str, source: str, output: Path, **roles_of_student: Any) -> Any:
    """Two steps of a method on stills of the tiny world."""
    method = load_method(name)
    roles: dict[str, Any] = {role: {"trainable": True} for role in method.trainable_roles}
    roles |= {role: {"trainable": False} for role in method.frozen_roles}
    roles["student"] |= roles_of_student
    rates = [field for field in method.Config.model_fields if field.endswith("learning_rate")]
    values = {
        "distill_model": family,
        "distill_method": name,
        "output": str(output / "run"),
        "model": {"path": source, "height": 32, "width": 32, "max_sequence_length": 8},
        "roles": roles,
        "ladder": {"times": [0.936, 0.803, 0.617]},
        "method": dict.fromkeys(rates, 1e-2),
        "data": {"path": "tiny", "size": 8, "batch_size": 2, "cache": str(output / "cache")},
        "trainer": {"max_steps": 2, "log_every": 1},
    }
    return validate(run_schema(family, name), values, "test")


def with_sections(config: Any, **sections: Any) -> Any:
    """A config with some fields of its sections changed."""
    values = config.model_dump()
    return validate(type(config), values | {name: values[name] | own for name, own in sections.items()}, "test")


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_ladder_above_the_noisiest_level_is_refused_with_one_that_fits(
    name: str, tiny_wan: Path, tmp_path: Path
) -> None:
    """Stock pipelines would not start where such a student was trained to; a table that ends in pure noise takes 1."""
    adapter = made_family(name, tiny_wan.parent)
    config = with_sections(config_of(name, "dmd2", adapter.config.path, tmp_path), ladder={"times": [1.0, 0.75, 0.5]})
    with pytest.raises(UserError, match=r"ladder\.times \(or steps, count\): they start at 1, .* is 0\.9360") as error:
        build_method(config, adapter)
    times = json.loads(f"[{str(error.value).split('{times: [')[1].rstrip(']}')}]")
    assert load_exporter(adapter.config).stock_sampler(times, "renoise").times == pytest.approx(times, abs=1e-6)
    build_method(with_sections(config, ladder={"times": times}), adapter)
    teacher = config_of(name, "sft", adapter.config.path, tmp_path)
    build_method(with_sections(teacher, ladder={"times": [1.0, 0.5]}), adapter)
    build_method(config, rescheduled(name, tiny_wan.parent, tmp_path / "v", **V))


def test_scores_above_the_noisiest_level_are_told(sdxl: Any, tmp_path: Path) -> None:
    config = config_of("sdxl", "dmd2", sdxl.config.path, tmp_path)
    (note,) = build_method(config, sdxl).notes
    assert note.startswith("method.score_time_range ends at 0.98, and the noisiest level of the teacher is 0.9360")
    assert not build_method(with_sections(config, method={"score_time_range": (0.1, 0.936)}), sdxl).notes


PUBLISHED = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
"""Parameters of SDXL's parts: half of the bytes of their weight files in half precision."""


@pytest.mark.parametrize("part", PUBLISHED)
def test_the_architecture_for_plans_is_the_published_one(part: str) -> None:
    import diffusers
    import transformers

    folder = architecture_folder("sdxl-base-1.0")
    library, name = json.loads((folder / "model_index.json").read_text())[part]
    config = json.loads((folder / part / "config.json").read_text())
    with torch.device("meta"):
        if library == "diffusers":
            network = getattr(diffusers, name).from_config(config)
        else:
            network = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[part]


FITTING = [
    name
    for name, method in ((name, load_method(name)) for name in METHODS)
    if not method.needs_trajectories and not lacks(method.Config(), method, load_adapter("sdxl"))
    if "frame_teacher" not in method.frozen_roles  # which sees frames of videos
]
"""Methods that train these families on latents or prompts."""
QUICK = ("dmd2",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FITTING]
)
def test_a_method_trains_the_student_and_leaves_a_model_that_samples(name: str, sdxl: Any, tmp_path: Path) -> None:
    student = run(config_of("sdxl", name, sdxl.config.path, tmp_path))
    model, before = load_model(str(student)), network_of(sdxl)
    after = dict(model.network.named_parameters())
    still = [key for key, value in before.named_parameters() if torch.equal(after[key], value)]
    assert not [
        key for key in still if "norm2" not in key
    ]  # of cross-attention, whose gradient is under Adam's epsilon
    latents = sample_latents(model.adapter, model.denoiser, Sampling(["a green seven"], model.sampler(), 0))
    assert latents.shape == (1, 4, 1, 16, 16)
    assert latents.isfinite().all()
