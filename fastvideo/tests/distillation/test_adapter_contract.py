"""What every registered model family must obey; a family is tested here from the moment it is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import AdapterConfig, DistillAdapter
from fastvideo.distillation.builder import ADAPTERS, load_adapter
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import Condition, RawBatch, UserError
from fastvideo.tests.distillation.tiny import FAMILIES, Family

COUNT = 3
TIMES = torch.tensor([0.9, 0.3, 0.6])


@pytest.fixture(params=ADAPTERS)
def family(request: pytest.FixtureRequest) -> Family:
    """A registered family; one that has no tiny factory fails here, by name."""
    return FAMILIES[request.param]


@pytest.fixture
def model(family: Family, tiny_wan: Path) -> DistillAdapter[Any]:
    return family.make(tiny_wan.parent)


@pytest.fixture
def network(model: DistillAdapter[Any]) -> nn.Module:
    return model.load_network()


@pytest.fixture
def condition(model: DistillAdapter[Any], family: Family) -> Condition:
    return model.encode_prompts([family.prompts[0], "", family.prompts[1]])


@pytest.fixture
def x_t(model: DistillAdapter[Any]) -> Tensor:
    return normal((COUNT, *model.latent_shape), seeded(2))


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_declares_itself(name: str) -> None:
    cls = load_adapter(name)
    assert cls.summary
    assert issubclass(cls.Config, AdapterConfig)


def test_velocity_is_float32_with_the_shape_of_its_input(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    u = model.velocity(network, x_t, TIMES, condition)
    assert u.shape == x_t.shape == (COUNT, *model.latent_shape)
    assert u.dtype == torch.float32
    assert u.isfinite().all()


def test_velocity_depends_on_its_arguments_alone(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    first = model.velocity(network, x_t, TIMES, condition)
    model.velocity(network, 2 * x_t, 0.5 * TIMES, condition)
    with torch.no_grad():
        again = model.velocity(network, x_t, TIMES, condition)
    assert torch.equal(first, again)


def test_velocity_reads_sample_time_and_prompt(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    base = model.velocity(network, x_t, TIMES, condition)
    others = (
        model.velocity(network, x_t + 0.1, TIMES, condition),
        model.velocity(network, x_t, TIMES - 0.1, condition),
        model.velocity(network, x_t, TIMES, Condition({k: v.flip(0) for k, v in condition.tensors.items()})),
    )
    for changed in others:
        assert not torch.allclose(changed[[0, 2]], base[[0, 2]], rtol=1e-5, atol=1e-7)


def test_samples_of_a_batch_do_not_see_each_other(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    x_t = x_t.clone().requires_grad_()
    u = model.velocity(network, x_t, TIMES, condition)
    (gradient,) = torch.autograd.grad(u[1].square().sum(), x_t)
    assert gradient[1].abs().sum() > 0
    assert torch.count_nonzero(gradient[[0, 2]]) == 0
    alone = model.velocity(network, x_t[[1]], TIMES[[1]], condition.rows(slice(1, 2)))
    torch.testing.assert_close(alone, u[[1]], rtol=1e-5, atol=1e-6)


def test_constant_times_per_frame_equal_a_time_per_sample(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    per_frame = TIMES[:, None].expand(-1, model.latent_shape[1])
    u = model.velocity(network, x_t, TIMES, condition)
    torch.testing.assert_close(model.velocity(network, x_t, per_frame, condition), u, rtol=1e-5, atol=1e-5)


def test_times_per_frame_belong_to_their_frame(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    frames = model.latent_shape[1]
    times = torch.linspace(0.3, 0.9, frames).expand(COUNT, frames)
    u = model.velocity(network, x_t, times, condition)
    for wrong in (times.flip(1), times[:, :1].expand(-1, frames), times[:, -1:].expand(-1, frames)):
        assert not torch.allclose(model.velocity(network, x_t, wrong, condition), u, rtol=1e-3, atol=1e-4)


def test_gradient_flows_to_the_input_and_to_every_parameter(
    model: DistillAdapter[Any], network: nn.Module, x_t: Tensor, condition: Condition
) -> None:
    x_t = x_t.clone().requires_grad_()
    model.velocity(network, x_t, TIMES, condition).square().sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(model: DistillAdapter[Any], family: Family) -> None:
    together = model.encode_prompts([*family.prompts, family.prompts[0]])
    fresh = type(model)(model.config)
    for key, value in together.tensors.items():
        assert value.shape[0] == COUNT
        torch.testing.assert_close(fresh.encode_prompts([family.prompts[0]]).tensors[key][0], value[0])
        torch.testing.assert_close(fresh.encode_prompts([family.prompts[1]]).tensors[key][0], value[1])
        assert torch.equal(value[2], value[0])
        assert not torch.equal(value[0], value[1])


def test_the_negative_condition_is_the_negative_prompt(model: DistillAdapter[Any]) -> None:
    model.ensure_negative_conditioning()
    negative, encoded = model.negative(2), model.encode_prompts([model.negative_prompt] * 2)
    assert negative.tensors.keys() == encoded.tensors.keys()
    for key, value in negative.tensors.items():
        assert torch.equal(value, encoded.tensors[key])


def test_a_batch_needs_negative_conditioning_first(model: DistillAdapter[Any], family: Family) -> None:
    with pytest.raises(RuntimeError, match="ensure_negative_conditioning"):
        model.prepare(RawBatch(family.prompts))


def test_negative_conditioning_is_made_once(model: DistillAdapter[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    original = type(model).encode_prompts

    def counting(self: DistillAdapter[Any], prompts: list[str]) -> Condition:
        encoded.append(list(prompts))
        return original(self, prompts)

    monkeypatch.setattr(type(model), "encode_prompts", counting)
    for _ in range(3):
        model.ensure_negative_conditioning()
    assert encoded == [[model.negative_prompt]]


def test_a_prepared_batch_has_what_a_method_reads(model: DistillAdapter[Any], family: Family) -> None:
    model.ensure_negative_conditioning()
    latents = normal((2, *model.latent_shape), seeded(1), dtype=torch.float64)
    batch = model.prepare(RawBatch(family.prompts, latents))
    assert len(batch) == 2
    assert batch.shape == (2, *model.latent_shape)
    assert batch.x0 is not None
    assert batch.x0.dtype == torch.float32
    torch.testing.assert_close(batch.x0, latents.float())
    expected = model.encode_prompts(family.prompts)
    for key, value in expected.tensors.items():
        assert torch.equal(batch.condition.tensors[key], value)
        assert batch.negative.tensors[key].shape == value.shape
    assert model.prepare(RawBatch(family.prompts)).x0 is None


def test_latents_of_a_wrong_shape_are_refused_with_both_shapes(model: DistillAdapter[Any], family: Family) -> None:
    model.ensure_negative_conditioning()
    channels, frames, height, width = model.latent_shape
    wrong = (channels, frames, width + 1, height)
    with pytest.raises(UserError) as caught:
        model.prepare(RawBatch(family.prompts, torch.zeros(2, *wrong)))
    assert str(wrong) in str(caught.value)
    assert str(model.latent_shape) in str(caught.value)


def test_latents_and_videos_have_matching_shapes(model: DistillAdapter[Any]) -> None:
    latents = normal((2, *model.latent_shape), seeded(1))
    videos = model.decode(latents)
    assert videos.shape[0] == 2
    assert model.decode(latents[:1]).shape[1:] == videos.shape[1:]
    encoded = model.encode(videos)
    assert encoded.shape == latents.shape
    assert encoded.dtype == torch.float32
    assert not encoded.requires_grad
    assert not videos.requires_grad


def test_the_codec_key_is_a_property_of_the_codec(model: DistillAdapter[Any]) -> None:
    assert model.codec_key
    assert type(model)(model.config).codec_key == model.codec_key


def test_networks_are_loaded_independently(model: DistillAdapter[Any], network: nn.Module) -> None:
    other = model.load_network()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.data_ptr() != two.data_ptr(), name
        assert one.dtype == torch.float32


def test_a_saved_pipeline_gives_back_the_weights_bit_for_bit(
    model: DistillAdapter[Any], network: nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01
    model.save_pipeline(tmp_path / "out", network, {"method": "toy"})
    assert "toy" in (tmp_path / "out" / "recipe.json").read_text()
    reader = type(model)(model.config.model_copy(update={"path": str(tmp_path / "out")}))
    found = reader.load_network().state_dict()
    for name, wanted in network.state_dict().items():
        assert torch.equal(wanted, found[name]), name
    by_path = model.load_network(str(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), by_path.parameters(), strict=True))
