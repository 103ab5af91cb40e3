"""Two experts as one network (Wan 2.2 A14B): routed by time, equal to stock diffusers, saved and read whole."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.conformance.run import CHECKS, examine
from fastvideo.conformance.subject import Subject
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily, boundary_in
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.experts import Experts, boundary_between, check_boundary
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.noise import guidance_at
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, guidance_text, sample
from fastvideo.distillation.types import Condition, UserError
from fastvideo.inference.loading import load_model, open_model
from fastvideo.tests.distillation.tiny import BOUNDARY, experts_folder, wan_config
from fastvideo.tests.distillation.tiny_images import i2v_experts_folder

PROMPTS = ("a green seven moving up", "red three")
CLOSE = 1e-5
"""Largest difference of a pixel in [0, 1]."""
SIZE = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def folder(tiny_wan: Path) -> Path:
    return experts_folder(tiny_wan.parent)


@pytest.fixture
def adapter(folder: Path) -> WanFamily:
    return WanFamily(wan_config(folder))


@pytest.fixture
def network(adapter: WanFamily) -> Experts:
    network = adapter.folder.load_network()
    assert isinstance(network, Experts)
    return network


def inputs(adapter: WanFamily, count: int) -> tuple[Tensor, Condition]:
    x_t = normal((count, *adapter.codec.latent_shape), seeded(3))
    return x_t, adapter.conditioner.encode_prompts([PROMPTS[i % 2] for i in range(count)])


def test_the_contract_holds_for_two_experts(adapter: WanFamily, tmp_path: Path) -> None:
    found = {outcome.name: outcome for outcome in examine(Subject(adapter, PROMPTS, tmp_path))}
    assert len(found) == len(CHECKS)
    assert [outcome for outcome in found.values() if outcome.result not in ("passed", "not applicable")] == []
    assert found["stock diffusers makes the same video"].result == "passed"
    assert found["gradient flows to the input and to every parameter"].result == "passed"


@torch.no_grad()
def test_every_sample_goes_to_the_expert_of_its_own_time(adapter: WanFamily, network: Experts) -> None:
    x_t, condition = inputs(adapter, 4)
    t = torch.tensor([0.2, BOUNDARY, 0.95, 0.874999])
    calls = Counter[str]()
    for name, child in network.named_children():
        child.register_forward_hook(lambda *_, name=name: calls.update([name]))
    mixed = adapter.velocity(network, x_t, t, condition)
    assert calls == {"transformer": 1, "transformer_2": 1}
    high, low = (adapter.velocity(one, x_t, t, condition) for one in (network.transformer, network.transformer_2))
    assert not torch.allclose(high, low, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1], high[2], low[3]]), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_batch_on_one_side_is_one_call_to_the_bit(adapter: WanFamily, network: Experts) -> None:
    x_t, condition = inputs(adapter, 2)
    t = torch.tensor([0.3, 0.5])
    network.transformer.register_forward_hook(lambda *_: pytest.fail("the expert of high noise was called"))
    assert torch.equal(
        adapter.velocity(network, x_t, t, condition), adapter.velocity(network.transformer_2, x_t, t, condition)
    )


def stock_video(folder: Path, noise: Tensor, times: tuple[float, ...], **guidance: float) -> Tensor:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = _scheduler(times)
    made = pipeline(
        PROMPTS[0], negative_prompt=PROMPTS[1], latents=noise, num_inference_steps=len(times), output_type="pt",
        **SIZE, **guidance,
    )[0]  # fmt: skip
    return made.transpose(1, 2)  # type: ignore[no-any-return]


def _scheduler(times: tuple[float, ...]) -> Any:
    from fastvideo.distillation.adapters.export.flow_match import flow_match_sampler

    return flow_match_sampler(times, "euler").scheduler


@pytest.mark.parametrize("guidance", [(3.0, 3.0), (4.0, 1.5)])
def test_four_guided_steps_give_the_video_of_the_stock_pipeline(
    adapter: WanFamily, network: Experts, folder: Path, guidance: tuple[float, float]
) -> None:
    times, noise = uniform_ladder(4, shift=5.0).times, SampleNoise([2])
    conditions = [adapter.conditioner.encode_prompts([prompt]) for prompt in PROMPTS]
    by_time = ((BOUNDARY, guidance[0]), (0.0, guidance[1]))
    latents = sample(
        Denoiser(adapter, network), noise, adapter.codec.latent_shape, SamplerSpec.teacher(times, by_time), *conditions
    )
    ours = (adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2
    drawn = SampleNoise([2]).draw(adapter.codec.latent_shape)
    theirs = stock_video(folder, drawn, times, guidance_scale=guidance[0], guidance_scale_2=guidance[1])
    assert (ours - theirs).abs().max() <= CLOSE


def test_guidance_by_time_is_that_of_each_samples_own_time() -> None:
    steps = ((0.875, 4.0), (0.3, 2.0), (0.0, 1.0))
    found = guidance_at(steps, torch.tensor([1.0, 0.875, 0.874, 0.3, 0.1]))
    assert torch.equal(torch.as_tensor(found), torch.tensor([4.0, 4.0, 2.0, 2.0, 1.0]))
    assert guidance_at(4.5, torch.ones(2)) == 4.5
    assert guidance_text(steps) == "4 from 0.875 up, 2 from 0.3 up, 1 below"


@torch.no_grad()
def test_a_number_and_the_same_number_by_time_guide_alike(adapter: WanFamily, network: Experts) -> None:
    x_t, condition = inputs(adapter, 2)
    role, (_, negative), t = Denoiser(adapter, network), inputs(adapter, 2), torch.tensor([0.9, 0.4])
    negative = negative.map(lambda value: value.flip(0))
    plain = role.guided_velocity(x_t, t, condition, negative, 3.0)
    assert torch.equal(role.guided_velocity(x_t, t, condition, negative, ((0.5, 3.0), (0.0, 3.0))), plain)
    mixed = role.guided_velocity(x_t, t, condition, negative, ((0.5, 3.0), (0.0, 1.0)))
    assert torch.equal(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], role.velocity(x_t, t, condition)[1], atol=1e-6, rtol=1e-5)


def test_a_teacher_is_sampled_with_the_guidance_of_each_expert(folder: Path, tiny_wan: Path) -> None:
    spec = open_model(str(folder), SIZE).sampler(4)
    assert spec.guidance == ((BOUNDARY, 4.0), (0.0, 3.0))
    images = i2v_experts_folder(tiny_wan.parent)
    assert open_model(str(images), {**SIZE, "max_sequence_length": 8}).sampler(4).guidance == 3.5


def test_an_exported_boundary_is_half_way_between_the_steps_beside_it(
    adapter: WanFamily, network: Experts, tmp_path: Path
) -> None:
    ladder = list(uniform_ladder(4, shift=5.0).times)
    adapter.folder.save(tmp_path / "student", network, {"ladder": ladder})
    assert boundary_in(str(tmp_path / "student")) == (0.9375 + 5 / 6) / 2
    assert boundary_between((1.0,), BOUNDARY) == boundary_between((), BOUNDARY) == BOUNDARY
    again = load_model(str(tmp_path / "student"), SIZE).network
    assert isinstance(again, Experts)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_a_step_on_the_boundary_is_refused_by_name() -> None:
    check_boundary(uniform_ladder(4, shift=5.0).times, BOUNDARY, "ladder.times")
    with pytest.raises(UserError, match=r"ladder\.times: the step 0\.875 is exactly the boundary"):
        check_boundary(uniform_ladder(4, shift=7.0).times, BOUNDARY, "ladder.times")


@pytest.mark.parametrize("ratio", [None, 1.5, "0.9"])
def test_two_networks_without_a_boundary_are_refused(folder: Path, tmp_path: Path, ratio: object) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boundary_ratio": ratio}))
    with pytest.raises(UserError, match=r"boundary_ratio in its model_index\.json.*0\.875 for Wan 2\.2 T2V"):
        WanFamily(wan_config(tmp_path / "model")).folder.load_network()


def test_one_network_for_a_model_of_two_is_refused(adapter: WanFamily, tiny_wan: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"a folder with transformer, and the model .* transformer and transformer_2"):
        adapter.folder.load_network(str(tiny_wan))
    with pytest.raises(UserError, match="is one file"):
        adapter.folder.load_network(str(folder / "transformer" / "diffusion_pytorch_model.safetensors"))


def test_frames_are_not_given_to_experts(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.given_frames: .* has two experts"):
        _ = WanFamily(wan_config(folder, given_frames=1)).codec.latent_shape


def test_an_image_goes_beside_the_noise_of_both_experts(tiny_wan: Path, tmp_path: Path) -> None:
    adapter = WanFamily(wan_config(i2v_experts_folder(tiny_wan.parent), num_frames=9))
    found = {outcome.name: outcome.result for outcome in examine(Subject(adapter, PROMPTS, tmp_path))}
    assert found["stock diffusers makes the same video"] == "passed"
    assert set(found.values()) <= {"passed", "not applicable"}
