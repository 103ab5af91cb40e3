"""The CogVideoX adapter equals stock diffusers: same prompts, same predictions, same latents and videos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter
from fastvideo.distillation.adapters.export.base import StockSampler
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.parallel.recompute import Recompute, checkpointed
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.samplers import euler, generate
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.tests.distillation.tiny import (
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    COGVIDEOX_15,
    cogvideox_config,
    cogvideox_folder,
)
from fastvideo.tests.preparing import preparer

PROMPTS = ["a green seven moving up", "  red   three & a "]
NEGATIVE = "blurry"
GUIDANCE = 3.5
PUBLISHED = {"2b": (COGVIDEOX_2B, 3.0), "5b": (COGVIDEOX_5B, 1.0), "1.5": (COGVIDEOX_15, 1.0)}
# Same operations in another order of batching: a few float32 roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Stock:
    """The stock pipeline over the adapter's folder."""

    pipeline: Any
    adapter: CogVideoXAdapter

    def __call__(self, steps: int, noise: Tensor, guidance: float = 1.0, **options: Any) -> Tensor:
        """What it makes of the prompts; latents and videos with the channels first."""
        config = self.adapter.config
        size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
        made: Tensor = self.pipeline(
            PROMPTS, negative_prompt=[NEGATIVE] * len(PROMPTS), guidance_scale=guidance, num_inference_steps=steps,
            max_sequence_length=config.max_sequence_length, latents=noise.transpose(1, 2), **size, **options,
        ).frames  # fmt: skip
        return made.transpose(1, 2)


@pytest.fixture(params=PUBLISHED, scope="module")
def adapter(request: pytest.FixtureRequest, tiny_wan: Path) -> CogVideoXAdapter:
    """Random weights in the form of each published network."""
    network, shift = PUBLISHED[request.param]
    folder = cogvideox_folder(tiny_wan.parent, network, shift)
    adapter = CogVideoXAdapter(cogvideox_config(folder, prompt_for_negative=NEGATIVE))
    adapter.ensure_negative_conditioning()
    return adapter


@pytest.fixture(scope="module")
def network(adapter: CogVideoXAdapter) -> nn.Module:
    return adapter.folder.load_network()


@pytest.fixture(scope="module")
def stock(adapter: CogVideoXAdapter) -> Stock:
    return Stock(stock_pipeline(Path(adapter.folder.pipeline.source)), adapter)


def stock_pipeline(folder: Path) -> Any:
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(adapter: CogVideoXAdapter) -> Tensor:
    return normal((len(PROMPTS), *adapter.codec.latent_shape), seeded(6))


@pytest.mark.parametrize("timestep", [0, 1, 19, 333, 500, 749, 998, 999])
@torch.no_grad()
def test_velocity_is_what_the_stock_scheduler_makes_of_the_prediction(
    adapter: CogVideoXAdapter, network: nn.Module, stock: Stock, timestep: int
) -> None:
    """The stock step gives x0; noise follows from the state; their difference is the velocity."""
    fed: list[Tensor] = []
    recorder = network.register_forward_hook(
        lambda module, args, kwargs, output: fed.extend([kwargs["timestep"], output[0]]), with_kwargs=True
    )
    table = stock.pipeline.scheduler.alphas_cumprod[timestep].float()
    alpha, sigma = table.sqrt(), (1 - table).sqrt()
    x = noise_of(adapter)
    t = torch.full((2,), adapter.folder.grid.times_of([timestep])[0])
    u = adapter.velocity(network, x / (alpha + sigma), t, adapter.conditioner.encode_prompts(PROMPTS))
    recorder.remove()
    given, v = fed
    assert given.tolist() == [timestep] * 2
    stock.pipeline.scheduler.set_timesteps(50)
    x0 = stock.pipeline.scheduler.step(v, timestep, x.transpose(1, 2)).pred_original_sample.transpose(1, 2)
    expected = (x - alpha * x0) / sigma - x0
    assert (u - expected).norm() <= 1e-5 * expected.norm()


def test_guided_euler_over_the_teacher_times_gives_the_pipelines_video(
    adapter: CogVideoXAdapter, network: nn.Module, stock: Stock
) -> None:
    noise, teacher = noise_of(adapter), RoleHandle("teacher", adapter, network)
    condition, negative = adapter.conditioner.encode_prompts(PROMPTS), adapter.conditioner.negative(len(PROMPTS))
    found = euler(
        lambda x_t, t: teacher.guided_velocity(x_t, t, condition, negative, GUIDANCE),
        noise,
        adapter.folder.teacher_times(10),
    )
    expected = stock(10, noise, GUIDANCE, output_type="latent")
    assert (expected - noise).abs().mean() > 0.1, "the network moved the noise"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    video = stock(10, noise, GUIDANCE, output_type="pt")
    assert video.shape == (2, 3, 9, 16, 32)
    torch.testing.assert_close((adapter.codec.decode(found) / 2 + 0.5).clamp(0, 1), video, rtol=1e-4, atol=1e-4)


def our_video(adapter: CogVideoXAdapter, network: nn.Module, sampler: StockSampler, kind: SamplerKind) -> Tensor:
    """Our student sampler over the stock sampler's times, its fresh noise drawn as the stock pipeline draws it."""
    generator = torch.Generator().manual_seed(5)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.transpose(1, 2).shape, generator=generator).transpose(1, 2)

    velocity = partial(adapter.velocity, network, condition=adapter.conditioner.encode_prompts(PROMPTS))
    latents = generate(kind, velocity, noise_of(adapter), sampler.times, draw)
    return (adapter.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", ["renoise", "euler"])
@pytest.mark.parametrize("steps", [1, 4])
def test_stock_diffusers_makes_the_students_video(
    adapter: CogVideoXAdapter, network: nn.Module, kind: SamplerKind, steps: int, tmp_path: Path
) -> None:
    sampler = load_exporter(adapter.config).stock_sampler([1 - i / steps for i in range(steps)], kind)
    assert sampler.times == adapter.folder.grid.times_of([999, 749, 499, 249][:steps])
    adapter.folder.save(tmp_path / "student", network, {})
    sampler.scheduler.save_pretrained(tmp_path / "student" / "scheduler")
    stock = Stock(stock_pipeline(tmp_path / "student"), adapter)
    stock.pipeline.scheduler = type(sampler.scheduler).from_pretrained(tmp_path / "student" / "scheduler")
    theirs = stock(steps, noise_of(adapter), generator=torch.Generator().manual_seed(5), output_type="pt")
    ours = our_video(adapter, network, sampler, kind)
    assert ours.std() > 0.01, "there is something to compare"
    assert (ours - theirs).abs().max() <= 1e-4, "of the brightness; one step of 8 bits is 4e-3"


@pytest.mark.parametrize("steps", [2, 3, 7, 8])
def test_a_stock_sampler_starts_from_pure_noise_with_any_number_of_steps(adapter: CogVideoXAdapter, steps: int) -> None:
    times = load_exporter(adapter.config).stock_sampler([1 - i / steps for i in range(steps)], "renoise").times
    assert times[0] == 1.0
    assert adapter.folder.grid.timestep(torch.tensor(times)).tolist() == [999 - i * 1000 // steps for i in range(steps)]


def test_uneven_euler_steps_are_refused(adapter: CogVideoXAdapter) -> None:
    with pytest.raises(UserError, match=r"takes 3 steps unevenly .* must divide 1000"):
        load_exporter(adapter.config).stock_sampler([1.0, 0.6, 0.3], "euler")
    with pytest.raises(UserError, match="sampler 'heun' has no stock counterpart"):
        load_exporter(adapter.config).stock_sampler([1.0], "heun")


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(adapter: CogVideoXAdapter, stock: Stock) -> None:
    length = adapter.config.max_sequence_length
    options = {"negative_prompt": [NEGATIVE] * 2, "max_sequence_length": length}
    expected, negative = stock.pipeline.encode_prompt(PROMPTS, **options)
    torch.testing.assert_close(
        adapter.conditioner.encode_prompts(PROMPTS).of(adapter.conditioner.key)["prompt_embeds"], expected, **CLOSE
    )
    torch.testing.assert_close(
        adapter.conditioner.negative(2).of(adapter.conditioner.key)["prompt_embeds"], negative, **CLOSE
    )


def test_a_prompt_that_is_too_long_is_refused_not_truncated(adapter: CogVideoXAdapter) -> None:
    with pytest.raises(UserError, match=r"prompt has 9 tokens, the text encoder takes 8 .*'a a a"):
        adapter.conditioner.encode_prompts(["a " * 8])
    assert adapter.conditioner.encode_prompts(["a " * 7]).of(adapter.conditioner.key)["prompt_embeds"].shape[1] == 8


def test_text_that_was_computed_before_is_used_if_it_is_whole(adapter: CogVideoXAdapter) -> None:
    latents = noise_of(adapter)
    extras = dict(adapter.conditioner.encode_stored(torch.empty(0), ["red", "a three"]))
    batch = preparer(adapter)(RawBatch(("other", "words"), latents, extras))
    expected = adapter.conditioner.encode_prompts(["red", "a three"]).of(adapter.conditioner.key)["prompt_embeds"]
    assert torch.equal(batch.condition.of(adapter.conditioner.key)["prompt_embeds"], expected)
    assert tuple(expected.shape[1:]) == adapter.conditioner.stored_shapes["text_embedding"] == (8, 16)
    with pytest.raises(UserError, match=r"text_embedding has shape \(5, 16\), the model expects \(8, 16\)"):
        preparer(adapter)(RawBatch(("other", "words"), latents, {"text_embedding": expected[:, :5]}))


@torch.no_grad()
def test_encoding_scales_the_posteriors_mean(adapter: CogVideoXAdapter, stock: Stock) -> None:
    videos = normal((2, 3, 9, 16, 32), seeded(3)).clamp(-1, 1)
    expected = 0.7 * stock.pipeline.vae.encode(videos).latent_dist.mode()
    found = adapter.codec.encode(videos)
    torch.testing.assert_close(found[:, :, -3:], expected, **CLOSE)
    if found.shape[2] == 4:  # a patch of CogVideoX 1.5 spans two latent frames: the first one stands in front again
        torch.testing.assert_close(found[:, :, 0], expected[:, :, 0], **CLOSE)


def test_times_per_frame_are_refused(adapter: CogVideoXAdapter, network: nn.Module) -> None:
    times = torch.full((2, adapter.codec.latent_shape[1]), 0.5)
    with pytest.raises(UserError, match="one time per sample"):
        adapter.velocity(network, noise_of(adapter), times, adapter.conditioner.negative(2))


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointed_gradients_equal_plain_ones(adapter: CogVideoXAdapter, kind: Recompute) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = adapter.folder.load_network()
        if checkpointing:
            adapter.scaling.recompute(network, checkpointed(kind))
        assert network.is_gradient_checkpointing == checkpointing
        adapter.velocity(
            network, noise_of(adapter), torch.tensor([0.3, 0.9]), adapter.conditioner.negative(2)
        ).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_position_table_for_other_prompts_is_refused(tiny_wan: Path) -> None:
    folder = cogvideox_folder(tiny_wan.parent, COGVIDEOX_2B, 3.0)
    with pytest.raises(UserError, match=r"max_sequence_length is 6, the network in .* takes 8 tokens"):
        CogVideoXAdapter(cogvideox_config(folder, max_sequence_length=6)).folder.load_network()


def test_raw_latents_are_normalised_as_encode_does(adapter: CogVideoXAdapter) -> None:
    videos = adapter.codec.decode(normal((1, *adapter.codec.latent_shape), seeded(3)))
    raw = adapter.codec.vae.encode(videos).latent_dist.mode()
    assert torch.equal(adapter.codec.normalise(raw), adapter.codec.encode(videos))
