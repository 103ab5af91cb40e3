"""Families on sigma schedules: equal to stock diffusers, texts masked, times exact, and what their students leave."""

from __future__ import annotations

import inspect
import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvideo.conformance.tiny import family_of, perturb
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, lengths
from fastvideo.distillation.adapters.diffusers.packing import Patches, Pictures
from fastvideo.distillation.adapters.diffusers.videos import OneByOneAdapter, Volumes
from fastvideo.distillation.adapters.export.lora import LAYOUTS, read_lora
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import load_exporter, load_method, run_schema
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import Condition, UserError
from fastvideo.inference.export import run_export
from fastvideo.inference.loading import load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.planning.fake import FakeMode, stacks
from fastvideo.tests.distillation.tiny import LATER, made_family
from fastvideo.training.run import run

QUICK = ("qwen_image",)
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
PROMPTS = ["a green seven moving up", "red three"]
CLOSE = 1e-5
"""Largest difference of a pixel in [0, 1]."""
OPTIONS: dict[str, dict[str, Any]] = {"flux": {"allow_cfg_on_distilled": True}}


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest, tiny_wan: Path) -> Any:
    return made_family(request.param, tiny_wan.parent, **OPTIONS.get(request.param, {}))


def stock_pipeline(adapter: DistillAdapter[Any]) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(adapter.config.path)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "tokenizer_2_max_length"):  # HunyuanVideo 1.5 takes it as an attribute
        pipeline.tokenizer_max_length = adapter.config.max_sequence_length
        pipeline.vae.enable_slicing()  # it takes one video
    return pipeline


def sizes(adapter: DistillAdapter[Any]) -> dict[str, int]:
    return {name: dict(adapter.config)[name] for name in load_exporter(adapter.config).call_options}


def stock_pictures(
    pipeline: Any, adapter: DistillAdapter[Any], noise: Tensor, guidance: float, **options: Any
) -> Tensor:
    """What the stock pipeline makes of the prompts, in [0, 1]."""
    exporter = load_exporter(adapter.config)
    call = {**exporter.call_arguments(4, guidance), **options, **sizes(adapter)}
    pipeline.register_modules(**exporter.stock_parts(guidance))
    alone = isinstance(adapter, OneByOneAdapter)  # in a batch its stock pipeline lets the shorter prompt see padding
    made = list[Tensor]()
    for rows in (slice(0, 1), slice(1, 2)) if alone else (slice(0, 2),):
        prompts = PROMPTS[rows]
        unwanted = {key: [value] * len(prompts) for key, value in call.items() if key == "negative_prompt"}
        latents = exporter.latent_arguments(noise[rows], adapter.codec.parts)
        made.append(pipeline(prompt=prompts, **latents, output_type="pt", **{**call, **unwanted})[0])
    return torch.cat(made)


def our_pictures(adapter: DistillAdapter[Any], noise: Tensor, guidance: float, times: tuple[float, ...]) -> Tensor:
    adapter.ensure_negative_conditioning()
    role = RoleHandle("teacher", adapter, adapter.folder.load_network())
    condition, negative = adapter.conditioner.encode_prompts(PROMPTS), adapter.conditioner.negative(2)
    latents = euler(lambda x, t, r=None: role.guided_velocity(x, t, condition, negative, guidance), noise, times)
    videos = (adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2
    return videos.squeeze(2) if load_exporter(adapter.config).makes_images else videos.transpose(1, 2)


@torch.no_grad()
def test_guided_steps_give_the_pictures_of_the_stock_pipeline_with_its_own_scheduler(family: Any) -> None:
    """Two prompts of other lengths, at two guidances."""
    pipeline, noise = stock_pipeline(family), normal((2, *family.codec.latent_shape), seeded(6))
    read = family.config.path.endswith("flux2-dev")  # no guidance but that which its network reads
    for number in (2.5, 5.0):
        adapter, guidance = (made_family_like(family, guidance_embedded=number), 1.0) if read else (family, number)
        ours = our_pictures(adapter, noise, guidance, family.folder.teacher_times(4))
        theirs = stock_pictures(pipeline, adapter, noise, guidance)
        assert float((ours - theirs).abs().max()) <= CLOSE


@torch.no_grad()
def test_a_ladder_with_its_sigmas_is_exact_in_the_stock_pipeline(family: Any) -> None:
    pipeline, noise = stock_pipeline(family), normal((2, *family.codec.latent_shape), seeded(7))
    uneven = family.config.stock.sigmas
    ladder = (1.0, 0.83, 0.31) if uneven else (1.0, 0.9090909, 0.7142857)  # or even ones at shift 5
    stock = load_exporter(family.config).stock_sampler(ladder, "euler")
    assert stock.times == pytest.approx(ladder, abs=1e-6 if uneven else 1e-4)
    pipeline.scheduler = stock.scheduler
    levels = {"sigmas": list(stock.sigmas)} if uneven else {}
    theirs = stock_pictures(pipeline, family, noise, 1.0, num_inference_steps=3, **levels)
    assert float((our_pictures(family, noise, 1.0, stock.times) - theirs).abs().max()) <= CLOSE
    if not uneven:
        return
    with pytest.raises(UserError, match=r"the ladder starts at 0\.9: this family's pipelines start from pure noise"):
        load_exporter(family.config).stock_sampler((0.9, 0.5), "euler")


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (4, 3)])
def test_a_teacher_is_called_where_the_stock_pipeline_calls_it(family: Any, rows: int, columns: int) -> None:
    side = 16 if family.config.num_frames == 1 else 32
    adapter = made_family_like(family, height=rows * side, width=columns * side)
    pipeline = stock_pipeline(adapter)

    def stop(pipeline: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        return values

    noise = torch.zeros(1, *adapter.codec.latent_shape)
    stopped = {"callback_on_step_end": stop}
    if "callback_on_step_end" not in inspect.signature(type(pipeline).__call__).parameters:
        pipeline.transformer.forward = lambda hidden_states, **_: (hidden_states[:, : noise.shape[1]],)
        stopped = {}
    for steps in (4, 28, 50):
        call = {**load_exporter(adapter.config).call_arguments(steps, 1.0), **sizes(adapter), **stopped}
        latents = load_exporter(adapter.config).latent_arguments(noise, adapter.codec.parts)
        pipeline(prompt=PROMPTS[0], **latents, output_type="latent", **call)
        assert adapter.folder.teacher_times(steps) == pytest.approx(pipeline.scheduler.sigmas[:-1].tolist(), abs=3e-7)


@torch.no_grad()
def test_padding_changes_nothing_where_it_is_masked(family: Any) -> None:
    """Two prompts of other lengths, and nine more rows of padding."""
    network, noise = family.folder.load_network(), normal((2, *family.codec.latent_shape), seeded(3))
    condition, t = family.conditioner.encode_prompts(PROMPTS), torch.tensor([0.4, 0.8])
    own = dict(condition.of(family.conditioner.key))
    if MASK not in own:
        pytest.skip("padding is encoded like words")
    assert own[MASK].sum(1).unique().numel() == 2
    longer = {TEXT: nn.functional.pad(own[TEXT], (0, 0, 0, 9)), MASK: nn.functional.pad(own[MASK], (0, 9))}
    padded = Condition({family.conditioner.key: {**own, **longer}})
    u, other = (family.velocity(network, noise, t, one) for one in (condition, padded))
    torch.testing.assert_close(u, other, rtol=1e-5, atol=1e-6)


def made_family_like(family: Any, **options: Any) -> Any:
    """Another adapter over the same folder."""
    return type(family)(family.config.model_copy(update=options))


def test_a_prompt_that_just_fits_is_taken_and_a_longer_one_refused(family: Any) -> None:
    """The template around it counts, its part that the pipeline drops does not."""
    (count,) = family.conditioner.token_counts([PROMPTS[0]])
    fits, short = (made_family_like(family, max_sequence_length=size) for size in (count, count - 1))
    texts = fits.conditioner.encode_prompts([PROMPTS[0]]).of(fits.conditioner.key)["prompt_embeds"]
    assert texts.shape[1] == fits.conditioner.token_rows
    assert texts[0, -1].any()
    with pytest.raises(UserError, match=f"prompt has {count} tokens, the text encoder takes {count - 1}"):
        short.conditioner.encode_prompts([PROMPTS[0]])


def test_sizes_that_do_not_divide_are_refused(family: Any) -> None:
    wrong = {**family.config.model_dump(), "height": 24}
    with pytest.raises(
        UserError, match=r"height must be a multiple of (16|32) .*, such as (16 or 32|32 or 64), got 24"
    ):
        validate(type(family.config), wrong, "test")


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Kandinsky 5 norms in float32
@torch.no_grad()
def test_a_small_step_in_time_is_seen_in_bfloat16(family: Any) -> None:
    """The networks of some families would round it away: 0.7 and 0.7003 are one number there."""
    adapter = made_family_like(family, precision="bfloat16")
    network = adapter.folder.load_network(dtype=torch.bfloat16)
    adapter.scaling.compute_directly(network)
    noise, condition = normal((1, *adapter.codec.latent_shape), seeded(3)), adapter.conditioner.encode_prompts(["red"])
    now, later = (adapter.velocity(network, noise, torch.tensor([t]), condition) for t in (0.7, 0.7003))
    assert not torch.equal(now, later)


@torch.no_grad()
def test_features_are_of_the_picture_whatever_the_prompt(family: Any) -> None:
    if family.codec.parts is not None:
        pytest.skip("they are of several parts")
    network, noise = family.folder.load_network(), normal((2, *family.codec.latent_shape), seeded(3))
    taps = tuple(range(len(family.feature_widths)))
    wanted = family.packing.tokens(family.codec.latent_shape)
    for prompts in (PROMPTS, ["red", "up"]):
        condition = family.conditioner.encode_prompts(prompts)
        _, found = family.features(network, noise, torch.tensor([0.4, 0.8]), condition, taps)
        assert [tuple(tokens.shape) for tokens in found] == [(2, wanted, width) for width in family.feature_widths]
    moved = noise.clone()
    moved[:, :, 0, 0, 0] += 3.0
    _, (before, *_) = family.features(network, noise, torch.tensor([0.4, 0.8]), condition, (0,))
    _, (after, *_) = family.features(network, moved, torch.tensor([0.4, 0.8]), condition, (0,))
    assert (after - before).square().sum((0, 2)).argmax() == 0


def test_a_network_first_called_in_inference_mode_can_be_trained(family: Any) -> None:
    network, noise = family.folder.load_network(), normal((1, *family.codec.latent_shape), seeded(3))
    condition, t = family.conditioner.encode_prompts(["red"]), torch.tensor([0.5])
    with torch.inference_mode():
        family.velocity(network, noise, t, condition)
    family.velocity(network.requires_grad_(True), noise, t, condition).square().sum().backward()


def test_tables_that_diffusers_keeps_are_made_outside_of_inference_mode(tiny_wan: Path) -> None:
    """On a CUDA device the tables of the text are kept too, and a step that trains cuts its positions from them."""
    family = made_family("qwen_image", tiny_wan.parent, **OPTIONS.get("qwen_image", {}))
    network, shape = family.folder.load_network(), family.codec.latent_shape
    with torch.inference_mode():
        family.velocity(
            network, normal((1, *shape), seeded(3)), torch.tensor([0.5]), family.conditioner.encode_prompts([""])
        )
    kept = network.pos_embed._compute_video_freqs(shape[1], shape[2] // 2, shape[3] // 2, 0, torch.device("cpu"))
    assert not kept.is_inference()


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("packing", [Patches(1), Patches(2), Pictures(2), Volumes(2), Volumes(2, channels_last=True)])
def test_latents_survive_their_packing(packing: Any, frames: int) -> None:
    if isinstance(packing, Pictures) and frames > 1:
        pytest.skip("pictures have one frame")
    x = normal((2, 3, frames, 6, 10), seeded(1))
    assert torch.equal(packing.unpack(packing.pack(x), x.shape), x)
    if packing.side == 2:
        with pytest.raises(UserError, match="latents of 5 pixels on a side do not divide into patches of 2"):
            packing.tokens((3, frames, 5, 6))


def test_flux_packing_is_that_of_stock_diffusers() -> None:
    from diffusers import FluxPipeline

    x = normal((2, 4, 1, 6, 10), seeded(1))
    assert torch.equal(Patches(2).pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 10))


@pytest.mark.slow
def test_the_guidance_that_flux_reads_is_a_condition(tiny_wan: Path) -> None:
    plain, weak = (made_family("flux", tiny_wan.parent, **one) for one in ({}, {"guidance_embedded": 1.5}))
    assert plain.conditioner.encode_prompts(PROMPTS).of(plain.conditioner.key)["guidance"].tolist() == [3.5, 3.5]
    weak.ensure_negative_conditioning()
    assert weak.conditioner.negative(2).of(weak.conditioner.key)["guidance"].tolist() == [1.5, 1.5]
    assert plain.conditioner.key != weak.conditioner.key
    assert load_exporter(weak.config).call_arguments(4, 1.0)["guidance_scale"] == 1.5
    with pytest.raises(UserError, match=r"guidance 4: the network reads a guidance \(3.5, model.guidance_embedded\)"):
        plain.folder.check_guidance(4.0)
    plain.folder.check_guidance(1.0)


def copied(family: Any, folder: Path, file: str, **changes: Any) -> str:
    """The family's folder with another entry in one of its JSON files."""
    shutil.copytree(family.config.path, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.slow
def test_the_guidance_of_flux2_dev_is_read_and_there_is_no_other(tiny_wan: Path) -> None:
    klein, dev = (made_family(name, tiny_wan.parent) for name in ("flux2", "flux2-dev"))
    assert dev.conditioner.encode_prompts(PROMPTS).of(dev.conditioner.key)["guidance"].tolist() == [4.0, 4.0]
    assert "guidance" not in klein.conditioner.encode_prompts(PROMPTS).of(klein.conditioner.key)
    assert (klein.folder.published_guidance, dev.folder.published_guidance) == (4.0, 1.0)
    weak = load_exporter(made_family_like(dev, guidance_embedded=2.0).config)
    assert weak.guidance_arguments(1.0) == load_exporter(klein.config).guidance_arguments(2.0) == {"guidance_scale": 2}
    with pytest.raises(UserError, match=r"guidance 4: the network reads a guidance \(4, model.guidance_embedded\)"):
        dev.folder.check_guidance(4.0)
    with pytest.raises(UserError, match="Flux2Pipeline takes no guidance between two predictions, 1"):
        weak.guidance_arguments(4.0)
    with pytest.raises(UserError, match=r"model\.guidance_embedded: the network of .*flux2 reads no guidance"):
        made_family_like(klein, guidance_embedded=2.0).folder.check_guidance(1.0)


@pytest.mark.slow
def test_guidance_where_there_is_none_is_refused(tiny_wan: Path, tmp_path: Path) -> None:
    flux, klein = (made_family(name, tiny_wan.parent) for name in ("flux", "flux2"))
    schnell = copied(flux, tmp_path / "schnell", "transformer/config.json", guidance_embeds=False)
    with pytest.raises(UserError, match="reads no guidance"):
        made_family_like(flux, path=schnell, guidance_embedded=2.0).folder.check_guidance(1.0)
    distilled = made_family_like(klein, path=copied(klein, tmp_path / "klein", "model_index.json", is_distilled=True))
    assert distilled.folder.published_guidance == 1.0
    for wanted, named in ((4.0, "guidance 4: "), (((0.5, 1.0), (0.0, 3.0)), r"guidance 3 of the pair \[0, 3\]: ")):
        with pytest.raises(UserError, match=named + r".* is distilled \(is_distilled in its index\)"):
            distilled.folder.check_guidance(wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(2, 62), (16, 8), (6, 22)])
@torch.no_grad()
def test_z_image_fills_31_32_and_33_tokens_for_each_sample_alone(tiny_wan: Path, rows: int, columns: int) -> None:
    family = made_family("z_image", tiny_wan.parent, max_sequence_length=40)
    network, x = family.folder.load_network(), normal((3, 4, 1, rows, columns), seeded(3))
    prompts, t = ["red", "green " * 31, "green " * 32], torch.tensor([0.2, 0.5, 0.8])  # and an end
    condition = family.conditioner.encode_prompts(prompts)
    assert condition.of(family.conditioner.key)[MASK].sum(1).tolist() == [2, 32, 33]
    u = family.velocity(network, x, t, condition)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(
            family.velocity(network, x[one], t[one], condition.rows(one)), u[one], rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_no_training_changes_the_statistics_of_flux2s_batch_norm(tiny_wan: Path) -> None:
    family = made_family("flux2", tiny_wan.parent)
    before = {name: value.clone() for name, value in family.codec.vae.bn.state_dict().items()}
    latents = normal((2, *family.codec.latent_shape), seeded(1)).requires_grad_()
    videos = family.codec.decode(latents, gradient=True)
    family.codec.encode(videos, gradient=True).square().sum().backward()
    assert not family.codec.vae.training
    assert all(torch.equal(value, before[name]) for name, value in family.codec.vae.bn.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_of_ltx_that_reads_a_time_gets_that_of_the_stock_pipeline(tiny_wan: Path, tmp_path: Path) -> None:
    from fastvideo.conformance.tiny_flow import ltx

    ltx(timed_decoder=True).save_pretrained(tmp_path)
    family = made_family("ltx", tiny_wan.parent, path=str(tmp_path))
    noise = normal((2, *family.codec.latent_shape), seeded(6))
    ours = our_pictures(family, noise, 2.5, family.folder.teacher_times(4))
    assert float((ours - stock_pictures(stock_pipeline(family), family, noise, 2.5)).abs().max()) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(480, 496), (480, 32)])
@torch.no_grad()
def test_kandinsky5_measures_distances_by_the_size_as_its_stock_pipeline_does(
    tiny_wan: Path, height: int, width: int
) -> None:
    sides = {"height": height, "width": width, "num_frames": 1}
    family = made_family("kandinsky5", tiny_wan.parent, **sides)
    x, seen = torch.zeros(2, *family.codec.latent_shape), list[Any]()
    network, condition = family.folder.load_network(), family.conditioner.encode_prompts(PROMPTS)
    network.visual_rope_embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    family.velocity(network, x, torch.ones(2), condition)
    assert seen == [stock_pipeline(family)._get_scale_factor(height, width)] * 2


@pytest.mark.slow
def test_kandinsky5_of_sparse_attention_is_refused_by_name(tiny_wan: Path, tmp_path: Path) -> None:
    family = made_family("kandinsky5", tiny_wan.parent)
    sparse = copied(family, tmp_path / "sparse", "transformer/config.json", attention_type="nabla")
    with pytest.raises(UserError, match=r"attention_type 'nabla' of the transformer in .*sparse: sparse attention is"):
        made_family_like(family, path=sparse).folder.load_network()
    with pytest.raises(UserError, match="attention_type 'nabla'"):
        family.folder.empty(sparse, torch.float32)


@pytest.mark.slow
@torch.no_grad()
def test_kandinsky5_without_places_for_given_frames_equals_stock_diffusers(tiny_wan: Path, tmp_path: Path) -> None:
    from fastvideo.conformance.tiny_flow import kandinsky5

    kandinsky5(visual_cond=False).save_pretrained(tmp_path)
    family = made_family("kandinsky5", tiny_wan.parent, path=str(tmp_path))
    perturb(network := family.folder.load_network())  # a fresh one's blocks answer their input
    network.save_pretrained(tmp_path / "transformer")
    noise = normal((2, *family.codec.latent_shape), seeded(6))
    ours = our_pictures(family, noise, 2.5, family.folder.teacher_times(4))
    assert float((ours - stock_pictures(stock_pipeline(family), family, noise, 2.5)).abs().max()) <= CLOSE


QUOTED = 'a green "seven" moving up'


@pytest.mark.slow
def test_hunyuan15_reads_quoted_text_by_an_encoder_of_its_own(tiny_wan: Path) -> None:
    family = made_family("hunyuan15", tiny_wan.parent)
    network, x = family.folder.load_network().requires_grad_(True), normal((2, *family.codec.latent_shape), seeded(3))
    glyphs = [parameter for name, parameter in network.named_parameters() if name.startswith("context_embedder_2.")]
    for prompts, alive in ((PROMPTS, False), ([QUOTED, "red"], True)):
        condition = family.conditioner.encode_prompts(prompts)
        assert condition.of(family.conditioner.key)["glyph_mask"].any(1).tolist() == [alive, False]
        family.velocity(network, x, torch.tensor([0.4, 0.8]), condition).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in glyphs) is alive
    with pytest.raises(
        UserError, match=r"prompt has 264 tokens between quotation marks, tokenizer_2 takes 256: 'a \"xx"
    ):
        family.conditioner.encode_prompts([f'a "{"x" * 254}"'])


@pytest.mark.slow
@torch.no_grad()
def test_hunyuan15_makes_the_stock_video_of_quoted_and_other_prompts_in_one_batch(tiny_wan: Path) -> None:
    family = made_family("hunyuan15", tiny_wan.parent)
    pipeline, noise = stock_pipeline(family), normal((2, *family.codec.latent_shape), seeded(6))
    role = RoleHandle("teacher", family, family.folder.load_network())
    condition, times = family.conditioner.encode_prompts([QUOTED, "red"]), family.folder.teacher_times(4)
    ours = euler(lambda x, t, r=None: role.velocity(x, t, condition), noise, times)
    exporter = load_exporter(family.config)
    pipeline.register_modules(**exporter.stock_parts(1.0))
    call = {**exporter.call_arguments(4, 1.0), **sizes(family)}
    theirs = pipeline(prompt=[QUOTED, "red"], latents=noise, output_type="latent", **call)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_guider_of_hunyuan15_says_whether_it_is_distilled(tiny_wan: Path, tmp_path: Path) -> None:
    family = made_family("hunyuan15", tiny_wan.parent)
    assert family.folder.published_guidance == 6.0
    family.folder.check_guidance(6.0)
    for name, changes in {"one": {"guidance_scale": 1.0}, "off": {"enabled": False}}.items():
        distilled = made_family_like(
            family, path=copied(family, tmp_path / name, "guider/guider_config.json", **changes)
        )
        assert distilled.folder.published_guidance == 1.0
        with pytest.raises(UserError, match=r"guidance 6: .* is distilled \(guidance 1 in its guider\)"):
            distilled.folder.check_guidance(6.0)
        with pytest.raises(UserError, match=r"guidance 6 of the pair \[0\.5, 6\]: .* is distilled"):
            distilled.folder.check_guidance(((0.5, 6.0), (0.0, 1.0)))
    late = copied(family, tmp_path / "late", "guider/guider_config.json", start=0.2)
    with pytest.raises(UserError, match=r"the guider of .*late is ClassifierFreeGuidance \(start 0\.2\)"):
        made_family_like(family, path=late).folder.check_guidance(1.0)
    other = copied(family, tmp_path / "other", "model_index.json", guider=["diffusers", "SkipLayerGuidance"])
    with pytest.raises(UserError, match=r"the guider of .*other is SkipLayerGuidance: plain ClassifierFreeGuidance"):
        made_family_like(family, path=other).folder.check_guidance(1.0)
    mean = copied(family, tmp_path / "mean", "transformer/config.json", use_meanflow=True)
    with pytest.raises(UserError, match=r"use_meanflow of the transformer in .*mean: its second time is not read"):
        made_family_like(family, path=mean).folder.load_network()


@pytest.mark.slow
def test_exports_of_hunyuan15_hold_the_students_guidance(tiny_wan: Path, tmp_path: Path) -> None:
    adapter = made_family("hunyuan15", tiny_wan.parent)
    run(config_of(adapter, "hunyuan15", "dmd2", tmp_path, lora={"rank": 2, "targets": ["to_q", "to_k"]}))
    source = str(tmp_path / "run")
    run_export(source, tmp_path / "whole", slim=True)
    run_export(source, tmp_path / "lora", to="lora-diffusers")
    for folder in (tmp_path / "whole", tmp_path / "lora"):
        assert json.loads((folder / "guider" / "guider_config.json").read_text())["guidance_scale"] == 1.0
    base = Path(adapter.config.path)
    assert json.loads((base / "guider" / "guider_config.json").read_text())["guidance_scale"] == 6.0
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "pipe.transformer.load_lora_adapter('lora', weight_name=" in text
    assert "pipe.guider = ClassifierFreeGuidance.from_pretrained('lora', subfolder='guider')" in text


def test_a_plan_finds_the_blocks_and_takes_texts_for_full(family: Any) -> None:
    blocks = stacks(family.folder.load_network())[0]
    assert len(blocks) == len(family.feature_widths)
    with FakeMode():
        assert lengths(torch.empty(2, 5, dtype=torch.bool)) == [5, 5]


TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "proj_mlp", "to_query", "to_value", "in_layer")
PROGRAMS = [("qwen_image", "diffusers"), ("qwen_image", "kohya"), ("qwen_image", "comfy")]


@pytest.mark.parametrize(
    ("name", "layout"), [*PROGRAMS, *(pytest.param(name, "diffusers", marks=pytest.mark.slow) for name in LATER)]
)
@torch.no_grad()
def test_a_lora_file_changes_the_stock_pipeline_as_it_changes_our_network(
    name: str, layout: str, tiny_wan: Path, tmp_path: Path
) -> None:
    adapter = made_family(name, tiny_wan.parent)
    network, exporter = adapter.folder.load_network(), load_exporter(adapter.config)
    layers = {key: m for key, m in network.named_modules() if isinstance(m, nn.Linear) and key.endswith(TARGETS)}
    stream, own = seeded(4), LAYOUTS[layout]
    factors = {
        key: (normal((2, m.in_features), stream), 0.3 * normal((m.out_features, 2), stream))
        for key, m in layers.items()
    }
    assert layout in exporter.lora_layouts
    save_file(own.write(factors, exporter.original_name, exporter.network_part), tmp_path / own.file)
    found = read_lora(tmp_path, {k: tuple(v.shape) for k, v in network.named_parameters()}, exporter)
    assert found.factors.keys() == factors.keys()
    pipeline = stock_pipeline(adapter)
    attrgetter(exporter.lora_loader)(pipeline)(tmp_path, weight_name=own.file)
    noise, given = normal((1, *adapter.codec.latent_shape), seeded(6)), adapter.conditioner.encode_prompts(PROMPTS[:1])
    bare = adapter.velocity(network, noise, torch.tensor([0.5]), given)
    for key, (down, up) in factors.items():
        layers[key].weight += up @ down
    merged = adapter.velocity(network, noise, torch.tensor([0.5]), given)
    stock = adapter.velocity(pipeline.transformer, noise, torch.tensor([0.5]), given)
    assert float((merged - bare).abs().max()) > 0.01
    torch.testing.assert_close(stock, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_on_layers_that_nothing_reads_trains_and_exports(tiny_wan: Path, tmp_path: Path) -> None:
    """Its file tells the stock pipeline's call."""
    adapter = made_family("qwen_image", tiny_wan.parent)
    run(config_of(adapter, "qwen_image", "dmd2", tmp_path, lora={"rank": 2, "targets": ["to_q", "add_q_proj"]}))
    run_export(str(tmp_path / "run"), tmp_path / "out", to="lora-comfy")
    run_export(str(tmp_path / "run"), tmp_path / "stock", to="lora-diffusers")
    call = "num_inference_steps=3, sigmas=[1.0, 0.75, 0.5], true_cfg_scale=1.0, height=32, width=32"
    assert call in (tmp_path / "stock" / "README.md").read_text()


def config_of(adapter: DistillAdapter[Any], family: str, name: str, output: Path, **student: Any) -> Any:
    """Two steps of a method on stills of the tiny world."""
    method = load_method(name)
    roles: dict[str, Any] = {role: {"trainable": True} for role in method.trainable_roles}
    roles |= {role: {"trainable": False} for role in method.frozen_roles}
    roles["student"] |= student
    rates = [field for field in method.Config.model_fields if field.endswith("learning_rate")]
    guided = (
        {"teacher_guidance": 1.0}
        if family in ("flux", "flux2-dev") and "teacher_guidance" in method.Config.model_fields
        else {}
    )
    values = {
        "distill_model": family_of(family),
        "distill_method": name,
        "output": str(output / "run"),
        "model": {**adapter.config.model_dump(), "height": 32, "width": 32},
        "roles": roles,
        "ladder": {"times": [1.0, 0.75, 0.5]},
        "method": {**dict.fromkeys(rates, 1e-2), **guided},
        "data": {"path": "tiny", "size": 8, "batch_size": 2, "cache": str(output / "cache")},
        "trainer": {"max_steps": 2, "log_every": 1},
    }
    return validate(run_schema(family_of(family), name), values, "test")


GOLDEN = Path(__file__).parent / "golden" / "families.json"
RELATIVE = 1e-3
"""Another CPU adds in another order, and the second step comes after one of Adam's first ones, which take signs."""


def check_golden(name: str, folder: Path) -> None:
    """Compare a run's losses with those that are committed; a name without any fails with what to commit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = sorted({key for line in lines for key in line if key.endswith("loss")})
    found = {key: [line[key] for line in lines if key in line] for key in keys}
    committed = json.loads(GOLDEN.read_text())
    assert name in committed, f"add to {GOLDEN}: {json.dumps({name: found})}"
    assert found == {key: pytest.approx(values, rel=RELATIVE, abs=1e-7) for key, values in committed[name].items()}


@pytest.mark.parametrize(
    "name", ["qwen_image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ltx", "ltx2", "hunyuan15"))]
)
def test_a_teacher_may_be_guided_by_time_where_its_stock_pipeline_is_not(
    name: str, tiny_wan: Path, tmp_path: Path
) -> None:
    """The score of a step is that of the pairs; only what stock diffusers would have to sample with is one number."""
    adapter, pairs, found = made_family(name, tiny_wan.parent), ((0.5, 4.0), (0.0, 1.0)), dict[str, Any]()
    for label, guidance in {"one": 1.0, "pairs": pairs, "all": 4.0}.items():
        config = config_of(adapter, name, "dmd2", tmp_path / label)
        changes = {"teacher_guidance": guidance, "generator_update_interval": 1}
        method = validate(type(config.method), config.method.model_dump() | changes, "test")
        run(config.model_copy(update={"method": method}))
        lines = (tmp_path / label / "run" / "metrics.jsonl").read_text().splitlines()
        found[label] = tuple(json.loads(line)["student/loss"] for line in lines)
    assert len(set(found.values())) == 3
    exporter = load_exporter(adapter.config)
    stock = exporter.stock_parts if name == "hunyuan15" else exporter.guidance_arguments
    with pytest.raises(UserError, match=r"guidance \[\[0\.5, 4\.0\], \[0\.0, 1\.0\]\]: the stock pipeline .* "):
        stock(pairs)


TRAINED = [("qwen_image", "dmd2")]
TRAINED_LATER = [*((name, "dmd2") for name in LATER), *(("qwen_image", name) for name in ("sft", "ladd", "mean_flow"))]


@pytest.mark.parametrize(
    ("name", "method"), [*TRAINED, *(pytest.param(*case, marks=pytest.mark.slow) for case in TRAINED_LATER)]
)
def test_a_method_trains_the_student_and_leaves_a_model_that_samples_and_exports(
    name: str, method: str, tiny_wan: Path, tmp_path: Path
) -> None:
    adapter = made_family(name, tiny_wan.parent)
    student = run(config_of(adapter, name, method, tmp_path))
    model = load_model(str(student))
    after = dict(model.network.named_parameters())
    still = {key for key, value in adapter.folder.load_network().named_parameters() if torch.equal(after[key], value)}
    unread = {key for key in after if name == "hunyuan15" and key.startswith("context_embedder_2.")}  # no quoted text
    assert still <= adapter.folder.dead_parameters(model.network) | unread
    check_golden(f"{name}-{method}", tmp_path / "run")
    latents = sample_latents(model.adapter, model.denoiser, Sampling(["a green seven"], model.sampler(), 0))
    assert latents.shape == (1, *model.adapter.codec.latent_shape)
    assert latents.isfinite().all()
    if method != "dmd2":
        return
    if not adapter.config.stock.sigmas:
        return
    run_export(str(tmp_path / "run"), tmp_path / "out")
    call = json.loads((tmp_path / "out" / "recipe.json").read_text())["stock_call"]
    assert call["sigmas"] == [1.0, 0.75, 0.5]
    assert f"sigmas={call['sigmas']}" in (tmp_path / "out" / "README.md").read_text()
