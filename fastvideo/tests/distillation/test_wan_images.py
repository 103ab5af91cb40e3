"""Going on from an image equals stock diffusers: the same network inputs and the same latents, for both ways of Wan."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.conformance.run import CHECKS, examine
from fastvideo.conformance.subject import Subject
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import Condition, RawBatch, UserError
from fastvideo.tests.distillation.tiny import wan_config
from fastvideo.tests.distillation.tiny_images import CLIP_TOKENS, CLIP_WIDTH, i2v_config, i2v_folder, ti2v_config
from fastvideo.tests.preparing import preparer

PROMPTS, NEGATIVE, STEPS, GUIDANCE = ["a green seven moving up", "red three"], "blurry", 3, 3.5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WAYS = ("i2v", "i2v_without_clip", "ti2v")


def adapter_of(way: str, root: Path, **options: Any) -> WanFamily:
    """The toy checkpoint that takes its image in this way."""
    options = {"prompt_for_negative": NEGATIVE, **options}
    if way == "ti2v":
        return WanFamily(ti2v_config(root, **options))
    config = i2v_config(root, **options)
    return WanFamily(config.model_copy(update={"path": str(i2v_folder(root, clip=way == "i2v"))}))


@pytest.fixture(params=WAYS)
def adapter(request: pytest.FixtureRequest, tiny_wan: Path) -> WanFamily:
    adapter = adapter_of(request.param, tiny_wan.parent)
    adapter.ensure_negative_conditioning()
    return adapter


@pytest.fixture
def i2v(tiny_wan: Path) -> WanFamily:
    adapter = adapter_of("i2v", tiny_wan.parent)
    adapter.ensure_negative_conditioning()
    return adapter


def picture(adapter: WanFamily) -> Tensor:
    """One image ``[3, H, W]`` in ``[-1, 1]`` whose values are exact in 8 bits."""
    shape = (3, adapter.config.height, adapter.config.width)
    return (normal(shape, seeded(5)) * 60 + 128).clamp(0, 255).round() / 127.5 - 1


def noise_of(adapter: WanFamily) -> Tensor:
    return normal((len(PROMPTS), *adapter.codec.latent_shape), seeded(6))


def stock(adapter: WanFamily) -> tuple[list[dict[str, Tensor]], Tensor, Ladder]:
    """What stock diffusers feeds its transformer, the latents it ends with, and the times it walks."""
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    pipeline = WanImageToVideoPipeline.from_pretrained(adapter.folder.pipeline.source)
    pipeline.set_progress_bar_config(disable=True)
    fed: list[dict[str, Tensor]] = []
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")

    def record(module: Any, args: Any, kwargs: Any) -> None:
        fed.append({name: kwargs[name] for name in names})

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pixels = ((picture(adapter) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    sizes = adapter.config.model_dump(include={"height", "width", "num_frames", "max_sequence_length"})
    latents = pipeline(
        Image.fromarray(pixels), PROMPTS, negative_prompt=[NEGATIVE] * len(PROMPTS), guidance_scale=GUIDANCE,
        num_inference_steps=STEPS, latents=noise_of(adapter), output_type="latent", **sizes,
    ).frames  # fmt: skip
    return fed, latents, Ladder(tuple(pipeline.scheduler.sigmas[:-1].tolist()))


def conditions(adapter: WanFamily) -> tuple[Condition, Condition]:
    """Positive and negative, going on from the picture."""
    images = adapter.conditioner.condition_on(picture(adapter)[None, :, None].expand(len(PROMPTS), -1, -1, -1, -1))
    texts = (adapter.conditioner.encode_prompts(prompts) for prompts in (PROMPTS, [NEGATIVE] * len(PROMPTS)))
    condition, negative = (text | images for text in texts)
    return condition, negative


@torch.no_grad()
def test_stock_diffusers_feeds_the_network_the_same_and_ends_with_the_same_latents(adapter: WanFamily) -> None:
    expected, latents, ladder = stock(adapter)
    condition, negative = conditions(adapter)
    network, fed = adapter.folder.load_network(), list[dict[str, Tensor]]()

    def record(module: Any, args: tuple[Tensor, ...], kwargs: Any) -> None:
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
        fed.append(dict(zip_longest(names, args)))

    network.register_forward_pre_hook(record, with_kwargs=True)
    role = RoleHandle("student", adapter, network)
    found = euler(
        lambda x, t: role.guided_velocity(x, t, condition, negative, GUIDANCE), noise_of(adapter), ladder.times
    )
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
    assert (latents - noise_of(adapter)).abs().mean() > 0.1, "the network moved the noise"
    assert len(fed) == len(expected) == 2 * STEPS
    for ours, theirs in zip(fed, expected, strict=True):
        for name, value in theirs.items():
            if value is None:
                assert ours[name] is None
            else:
                torch.testing.assert_close(ours[name], value.expand(ours[name].shape), **CLOSE)


def test_the_image_is_in_the_condition_as_its_checkpoint_takes_it(adapter: WanFamily) -> None:
    condition, _ = conditions(adapter)
    channels, frames, height, width = adapter.codec.latent_shape
    own = condition.of(adapter.conditioner.key)
    if condition.given is None:
        latents = own["image_latents"]
        assert latents.shape == (2, 4 + channels, frames, height, width)
        assert (latents[:, :4, 0] == 1).all()
        assert (latents[:, :4, 1:] == 0).all()
        embeds = own.get("image_embeds")
        reads_clip = (Path(adapter.config.path) / "image_encoder").is_dir()
        assert (None if embeds is None else embeds.shape) == ((2, CLIP_TOKENS, CLIP_WIDTH) if reads_clip else None)
    else:
        assert condition.given.mask.tolist() == [[True] + [False] * (frames - 1)] * 2
        assert set(own) == {"prompt_embeds"}


def test_another_image_makes_another_video(adapter: WanFamily) -> None:
    network, role_times = adapter.folder.load_network(), torch.tensor([0.9, 0.4])
    role = RoleHandle("student", adapter, network)
    velocities = []
    for image in (picture(adapter), -picture(adapter)):
        images = adapter.conditioner.condition_on(image[None, :, None].expand(2, -1, -1, -1, -1))
        velocities.append(
            role.velocity(noise_of(adapter), role_times, adapter.conditioner.encode_prompts(PROMPTS) | images)
        )
    assert not torch.allclose(velocities[0][:, :, 1:], velocities[1][:, :, 1:], rtol=1e-3, atol=1e-4)


def test_the_clip_features_alone_change_the_velocity(i2v: WanFamily) -> None:
    condition, _ = conditions(i2v)
    other = condition | Condition(
        {i2v.conditioner.key: {"image_embeds": normal((2, CLIP_TOKENS, CLIP_WIDTH), seeded(3))}}
    )
    network, t = i2v.folder.load_network(), torch.tensor([0.9, 0.4])
    velocities = [i2v.velocity(network, noise_of(i2v), t, one) for one in (condition, other)]
    assert not torch.allclose(*velocities, rtol=1e-3, atol=1e-4)


def test_every_rule_of_the_adapter_contract_holds(adapter: WanFamily, tmp_path: Path) -> None:
    outcomes = list(examine(Subject(adapter, (PROMPTS[0], PROMPTS[1]), tmp_path)))
    assert [(outcome.name, outcome.message) for outcome in outcomes if outcome.result == "FAILED"] == []
    assert len(outcomes) == len(CHECKS)


@torch.no_grad()
def test_the_first_frame_of_a_video_is_given_alike_by_data_and_by_an_image(tiny_wan: Path) -> None:
    """The codec is causal, so the first latent frame of a video is that of its first frame."""
    adapter = adapter_of("ti2v", tiny_wan.parent, given_frames=1)
    adapter.ensure_negative_conditioning()
    config = adapter.config
    video = normal((1, 3, config.num_frames, config.height, config.width), seeded(8)).clamp(-1, 1)
    batch = preparer(adapter)(RawBatch(("red",), adapter.codec.encode(video)))
    by_image = adapter.conditioner.condition_on(video[:, :, :1])
    assert batch.condition.given is not None
    assert by_image.given is not None
    assert torch.equal(batch.condition.given.mask, by_image.given.mask)
    torch.testing.assert_close(batch.condition.given.clean[:, :, :1], by_image.given.clean[:, :, :1], **CLOSE)
    assert batch.negative.given is batch.condition.given
    assert adapter.conditioner.needs_frames


@torch.no_grad()
def test_what_is_computed_beforehand_stands_in_for_what_is_computed_now(adapter: WanFamily) -> None:
    config = adapter.config
    videos = normal((2, 3, config.num_frames, config.height, config.width), seeded(9)).clamp(-1, 1)
    extras = adapter.conditioner.encode_stored(videos, PROMPTS)
    assert set(extras) == set(adapter.conditioner.stored_shapes)
    for name, shape in adapter.conditioner.stored_shapes.items():
        wanted = [have if want is None else want for want, have in zip(shape, extras[name].shape[1:], strict=True)]
        assert list(extras[name].shape) == [2, *wanted]
    latents = adapter.codec.encode(videos)
    now = adapter.conditioner.encode_prompts(PROMPTS)
    if adapter.conditioner.needs_frames:
        now = now | adapter.conditioner.condition_on(videos[:, :, :1])
    found = preparer(adapter)(RawBatch(PROMPTS, latents, extras)).condition
    own, wanted_own = (condition.of(adapter.conditioner.key) for condition in (found, now))
    assert own.keys() == wanted_own.keys()
    for name, value in wanted_own.items():
        torch.testing.assert_close(own[name], value, **CLOSE)


@torch.no_grad()
def test_latents_alone_give_an_image_to_video_checkpoint_its_first_frame(i2v: WanFamily) -> None:
    latents = normal((2, *i2v.codec.latent_shape), seeded(9))
    batch = preparer(i2v)(RawBatch(tuple(PROMPTS), latents))
    frame = i2v.codec.decode(latents)[:, :, :1]
    expected = i2v.conditioner.condition_on(frame).of(i2v.conditioner.key)
    own, negative = (condition.of(i2v.conditioner.key) for condition in (batch.condition, batch.negative))
    for name in ("image_latents", "image_embeds"):
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-4)
        assert torch.equal(negative[name], own[name])
    assert batch.condition.given is None
    with pytest.raises(UserError, match="prompts alone"):
        preparer(i2v)(RawBatch(tuple(PROMPTS)))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_buckets_of_another_size_have_given_frames_too(way: str, tiny_wan: Path) -> None:
    adapter = adapter_of(way, tiny_wan.parent, given_frames=int(way == "ti2v"))
    adapter.ensure_negative_conditioning()
    channels, frames, height, width = adapter.codec.latent_shape
    latents = normal((2, channels, frames + 1, height + 2, width), seeded(9))
    batch = replace(preparer(adapter), any_size=True)(RawBatch(tuple(PROMPTS), latents))
    u = RoleHandle("student", adapter, adapter.folder.load_network()).velocity(latents, torch.ones(2), batch.condition)
    assert u.shape == latents.shape


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("text_embedding", (2, 5, 7), "text_embedding has width 7, the model's text has width 16"),
        ("text_embedding", (2, 513, 16), "has 513 tokens, the model sees 512"),
        ("first_frame_latent", (2, 4, 3, 2, 5), r"first_frame_latent has shape \(4, 3, 2, 5\), .* \(4, 3, 2, 4\)"),
        ("clip_feature", (2, 5, 17), r"clip_feature has shape \(5, 17\), the model expects \('any', 16\)"),
        ("clip_feature", (2, 16), r"clip_feature has shape \(16,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    name: str, shape: tuple[int, ...], message: str, i2v: WanFamily
) -> None:
    with pytest.raises(UserError, match=message):
        preparer(i2v)(
            RawBatch(tuple(PROMPTS), normal((2, *i2v.codec.latent_shape), seeded(1)), {name: torch.ones(shape)})
        )


def test_a_shorter_text_is_padded_and_padding_beyond_the_limit_is_cut(i2v: WanFamily) -> None:
    text = i2v.conditioner.encode_prompts(PROMPTS).of(i2v.conditioner.key)["prompt_embeds"]
    for given in (text[:, :6], torch.cat([text, torch.zeros_like(text)], dim=1)):
        found = i2v.conditioner.text_of(RawBatch(tuple(PROMPTS), None, {"text_embedding": given.half()}))
        torch.testing.assert_close(found.of(i2v.conditioner.key)["prompt_embeds"], text, rtol=1e-3, atol=1e-3)


def test_the_number_of_given_frames_is_what_the_checkpoint_takes(tiny_wan: Path) -> None:
    root = tiny_wan.parent
    found = {
        "text": WanFamily(wan_config(tiny_wan)),
        "tuned": WanFamily(wan_config(tiny_wan, given_frames=1)),
        "clip": WanFamily(wan_config(tiny_wan, given_frames=2, num_frames=9)),
        "i2v": adapter_of("i2v", root),
        "ti2v": adapter_of("ti2v", root),
        "ti2v tuned": adapter_of("ti2v", root, given_frames=1),
    }
    counts = {name: adapter.conditioner.first_frames for name, adapter in found.items()}
    assert counts == {"text": (0,), "tuned": (1,), "clip": (5,), "i2v": (1,), "ti2v": (0, 1), "ti2v tuned": (1,)}
    with pytest.raises(UserError, match="goes on from 0 given frames, got 1"):
        found["text"].conditioner.condition_on(torch.zeros(1, 3, 1, 16, 32))
    with pytest.raises(UserError, match="goes on from 5 given frames, got 0"):
        found["clip"].conditioner.condition_on(None)
    assert found["clip"].conditioner.condition_on(torch.zeros(1, 3, 5, 16, 32)).given is not None


def test_options_that_do_not_fit_the_checkpoint_are_refused(tiny_wan: Path) -> None:
    with pytest.raises(UserError, match=r"model\.given_frames: .* it takes 0, got 1"):
        _ = adapter_of("i2v", tiny_wan.parent, given_frames=1).conditioner.first_frames
    with pytest.raises(UserError, match=r"model\.max_sequence_length: .* exactly 512 text tokens, got 8"):
        _ = adapter_of("i2v", tiny_wan.parent, max_sequence_length=8).codec.latent_shape
    with pytest.raises(UserError, match=r"model\.width: .* multiples of 32, got 48"):
        _ = adapter_of("ti2v", tiny_wan.parent, width=48).codec.latent_shape
    with pytest.raises(ValueError, match="must leave one of 2 latent frames to generate, got 2"):
        WanFamilyConfig(num_frames=5, given_frames=2)


def test_a_student_with_given_frames_loads_into_stock_image_to_video(tiny_wan: Path, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    adapter = WanFamily(wan_config(tiny_wan, given_frames=1))
    adapter.folder.save(tmp_path / "student", adapter.folder.load_network(), {})
    assert WanImageToVideoPipeline.from_pretrained(tmp_path / "student").config.expand_timesteps
    assert WanFamily(wan_config(tmp_path / "student")).conditioner.first_frames == (0, 1)
    plain = WanFamily(wan_config(tiny_wan))
    plain.folder.save(tmp_path / "plain", plain.folder.load_network(), {})
    assert WanFamily(wan_config(tmp_path / "plain")).conditioner.first_frames == (0,)
