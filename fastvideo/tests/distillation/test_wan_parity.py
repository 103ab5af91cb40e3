"""The Wan adapter equals stock diffusers: same prompts, same network inputs, same latents and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.conditioner import PromptCache
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.parallel.recompute import Recompute, checkpointed
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import wan_config

PROMPTS = ["a green seven moving up", "  red   three &amp; a "]
NEGATIVE = "blurry"
STEPS, GUIDANCE = 4, 3.5
# Same operations in another order of batching: a few float32 roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["random", "embedded"])
def adapter(request: pytest.FixtureRequest, tiny_wan: Path) -> WanFamily:
    """Random weights on a small odd shape, and the weights that ship with the package."""
    random = wan_config(tiny_wan, prompt_for_negative=NEGATIVE)
    adapter = WanFamily(random if request.param == "random" else WanFamilyConfig(prompt_for_negative=NEGATIVE))
    adapter.ensure_negative_conditioning()
    return adapter


@pytest.fixture
def pipeline(adapter: WanFamily) -> Any:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(adapter.folder.pipeline.source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(adapter: WanFamily) -> Tensor:
    return normal((len(PROMPTS), *adapter.codec.latent_shape), seeded(6))


def stock(pipeline: Any, adapter: WanFamily, **options: Any) -> Any:
    """What the stock pipeline makes of the prompts, from the same noise."""
    config = adapter.config
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    return pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * len(PROMPTS), guidance_scale=GUIDANCE, num_inference_steps=STEPS,
        max_sequence_length=config.max_sequence_length, latents=noise_of(adapter), **size, **options,
    ).frames  # fmt: skip


def ours(adapter: WanFamily, pipeline: Any) -> Tensor:
    """Euler with guidance on the ladder that the stock scheduler walks."""
    pipeline.scheduler.set_timesteps(STEPS)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    sigmas = pipeline.scheduler.sigmas.tolist()
    assert sigmas[-1] == 0.0
    teacher = RoleHandle("teacher", adapter, adapter.folder.load_network())
    condition, negative = adapter.conditioner.encode_prompts(PROMPTS), adapter.conditioner.negative(len(PROMPTS))
    return euler(
        lambda x_t, t: teacher.guided_velocity(x_t, t, condition, negative, GUIDANCE),
        noise_of(adapter),
        Ladder(tuple(sigmas[:-1])).times,
    )


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(adapter: WanFamily, pipeline: Any) -> None:
    length = adapter.config.max_sequence_length
    expected, negative = pipeline.encode_prompt(PROMPTS, negative_prompt=[NEGATIVE] * 2, max_sequence_length=length)
    found = adapter.conditioner.encode_prompts(PROMPTS).of(adapter.conditioner.key)["prompt_embeds"]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(
        adapter.conditioner.negative(2).of(adapter.conditioner.key)["prompt_embeds"], negative, **CLOSE
    )
    assert torch.count_nonzero(found[1, -1]) == 0, "beyond the prompt there is zero, not an encoded padding"
    assert found.abs().sum(-1)[0, :6].min() > 0


def test_the_network_gets_what_the_pipeline_feeds_it(adapter: WanFamily, pipeline: Any) -> None:
    fed: list[dict[str, Tensor]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        fed.append({**{name: kwargs[name] for name in names}, "output": output[0]})

    pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    stock(pipeline, adapter, output_type="latent")
    assert len(fed) == 2 * STEPS
    network, condition = adapter.folder.load_network(), adapter.conditioner.encode_prompts(PROMPTS)
    for call in fed[::2]:
        t = call["timestep"].float() / 1000
        with torch.no_grad():
            u = adapter.velocity(network, call["hidden_states"], t, condition)
        torch.testing.assert_close(u, call["output"], **CLOSE)


def test_guided_euler_gives_the_pipelines_latents(adapter: WanFamily, pipeline: Any) -> None:
    expected = stock(pipeline, adapter, output_type="latent")
    found = ours(adapter, pipeline)
    assert (expected - noise_of(adapter)).abs().mean() > 0.1, "the network moved the noise"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_decoding_gives_the_pipelines_video(adapter: WanFamily, pipeline: Any) -> None:
    expected = stock(pipeline, adapter, output_type="pt")
    videos = adapter.codec.decode(ours(adapter, pipeline))
    config = adapter.config
    assert videos.shape == (2, 3, config.num_frames, config.height, config.width)
    torch.testing.assert_close((videos / 2 + 0.5).clamp(0, 1).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_encoding_normalises_with_the_published_statistics(adapter: WanFamily, pipeline: Any) -> None:
    config = adapter.config
    videos = normal((1, 3, config.num_frames, config.height, config.width), seeded(3)).clamp(-1, 1)
    raw = pipeline.vae.encode(videos).latent_dist.mode()
    found = adapter.codec.encode(videos)
    for channel, (mean, std) in enumerate(
        zip(pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std, strict=True)
    ):
        torch.testing.assert_close(found[:, channel], (raw[:, channel] - mean) / std, **CLOSE)


def test_a_change_of_encoder_or_normalisation_changes_the_codec_key(adapter: WanFamily, tmp_path: Path) -> None:
    """Another decoder does not: its latents are the same. Files of earlier versions hold a key that told it apart."""
    keys, former = [adapter.codec.latent_key], [adapter.codec.known_keys[1]]
    for bias, shift, decoder in ((0.0, 0.0, 1e-3), (1e-6, 0.0, 0.0), (0.0, 1e-6, 0.0)):
        folder = tmp_path / f"{bias}_{shift}"
        adapter.folder.save(folder, adapter.folder.load_network(), {})
        vae = WanFamily(adapter.config.model_copy(update={"path": str(folder)})).codec.vae
        vae.encoder.conv_in.bias.data += bias
        vae.post_quant_conv.bias.data += decoder
        vae.decoder.conv_in.bias.data += decoder
        vae.register_to_config(latents_mean=[mean + shift for mean in vae.config.latents_mean])
        vae.save_pretrained(folder / "vae")
        codec = WanFamily(adapter.config.model_copy(update={"path": str(folder)})).codec
        keys.append(codec.latent_key)
        former.append(codec.known_keys[1])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert len({*keys, *former}) == 7


@torch.no_grad()
def test_times_per_frame_are_the_pipelines_times_per_token(adapter: WanFamily, pipeline: Any) -> None:
    frames, height, width = adapter.codec.latent_shape[1:]
    times = torch.tensor([[0.3, 0.9, 0.5], [0.6, 0.1, 0.2]])[:, :frames]
    mask = torch.ones(frames, height, width)
    per_token = torch.stack([(mask[:, ::2, ::2] * (1000 * t).view(-1, 1, 1)).flatten() for t in times])
    condition = adapter.conditioner.encode_prompts(PROMPTS)
    embeds = condition.of(adapter.conditioner.key)["prompt_embeds"]
    (expected,) = pipeline.transformer(noise_of(adapter), per_token, embeds, return_dict=False)
    found = adapter.velocity(adapter.folder.load_network(), noise_of(adapter), times, condition)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_teacher_is_called_where_the_published_scheduler_calls_it(
    adapter: WanFamily, pipeline: Any, steps: int
) -> None:
    """Wan's checkpoints come with UniPC, whose grid ends at 1/1000 before the shift where ours ends at 0."""
    from diffusers import UniPCMultistepScheduler

    shift = pipeline.scheduler.config.shift
    published = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    published.set_timesteps(steps)
    torch.testing.assert_close(
        torch.tensor(adapter.folder.teacher_times(steps)), published.sigmas[:-1], rtol=0, atol=3e-3, check_dtype=False
    )


def test_a_saved_student_loads_into_the_stock_pipeline(adapter: WanFamily, pipeline: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    network = adapter.folder.load_network()
    with torch.no_grad():
        network.proj_out.bias += 1.0
    adapter.folder.save(tmp_path / "student", network, {})
    loaded = WanPipeline.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.transformer.proj_out.bias, pipeline.transformer.proj_out.bias + 1.0)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointed_gradients_are_recomputed_and_equal_plain_ones(adapter: WanFamily, kind: Recompute) -> None:
    gradients, forwards = [], [0, 0]
    for checkpointing in (False, True):
        network = adapter.folder.load_network()
        if checkpointing:
            adapter.scaling.recompute(network, checkpointed(kind))

        def count(module: Any, inputs: Any, which: int = int(checkpointing)) -> None:
            forwards[which] += 1

        network.blocks[0].register_forward_pre_hook(count)
        adapter.velocity(
            network, noise_of(adapter), torch.tensor([0.3, 0.9]), adapter.conditioner.negative(2)
        ).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert forwards == [1, 2], "backward runs the block again, and only with checkpointing"
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_prompt_that_is_too_long_is_refused_not_truncated(adapter: WanFamily) -> None:
    limit = adapter.config.max_sequence_length
    with pytest.raises(UserError, match=rf"prompt has {limit + 1} tokens, the text encoder takes {limit} .*'a a a"):
        adapter.conditioner.encode_prompts(["a " * limit])
    longest = adapter.conditioner.encode_prompts(["a " * (limit - 1)])
    assert longest.of(adapter.conditioner.key)["prompt_embeds"].shape[1] == limit


def test_the_prompt_cache_forgets_the_least_recently_used_and_changes_no_result(tiny_wan: Path) -> None:
    small = WanFamily(wan_config(tiny_wan, prompt_cache_mib=0)).conditioner
    large = WanFamily(wan_config(tiny_wan)).conditioner
    for prompts in (["a", "red", "a"], ["red"], ["up", "a"]):
        found, kept = (one.encode_prompts(prompts).of(one.key)["prompt_embeds"] for one in (small, large))
        assert torch.equal(found, kept)
    assert (len(small._prompts), len(large._prompts)) == (0, 3)


def test_the_prompt_cache_is_bounded_in_bytes() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> Tensor:
        encoded.append(prompt)
        return torch.ones(len(prompt), 8)

    cache = PromptCache(encode, limit=6 * 8 * 4)
    for prompts in (["aaa", "bb"], ["aaa"], ["cc"], ["aaa"], ["bb"]):
        assert [len(row) for row in cache(prompts)] == [len(prompt) for prompt in prompts]
        assert cache.bytes <= 6 * 8 * 4
    assert encoded == ["aaa", "bb", "cc", "bb"], "the least recently used goes first"
    cache(["d" * 7])
    assert (len(cache), cache.bytes) == (0, 0)


@torch.no_grad()
def test_cached_prompts_are_cut_to_their_tokens_and_padded_to_the_bit(adapter: WanFamily) -> None:
    conditioner, (prompt, _) = adapter.conditioner, PROMPTS
    tokens = conditioner.tokenizer(
        [prompt], padding="max_length", max_length=conditioner.text_length, return_tensors="pt"
    )
    hidden = conditioner.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    found = conditioner.encode_prompts([prompt]).of(conditioner.key)["prompt_embeds"]
    assert torch.equal(found, hidden * tokens.attention_mask.unsqueeze(-1))
    (row,) = conditioner._prompts([prompt])
    assert len(row) == int(tokens.attention_mask.sum()) < found.shape[1]
    assert row.untyped_storage().nbytes() == row.nbytes, "a view would keep the padding in memory"


def test_a_folder_of_another_kind_is_refused(tmp_path: Path, tiny_wan: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        WanFamily(wan_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        WanFamily(wan_config(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    with pytest.raises(UserError, match="holds a CogVideoXPipeline; this family reads WanPipeline"):
        WanFamily(wan_config(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(UserError, match="cannot load 'transformer'"):
        WanFamily(wan_config(tmp_path)).folder.load_network()
