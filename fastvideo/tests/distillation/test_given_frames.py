"""Given frames: clean in every network input, in no loss, and the same in training and sampling, for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.config.causal import CausalOptions
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.noise import add_noise, velocity_target
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.rng import RandomStreams, normal, seeded
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, Condition, Given, mean_over_generated
from fastvideo.tests.distillation.toys import LADDER, SpyAdapter, analytic_batch, gaussian, spy, toy_method, with_given

TAKING = [name for name in METHODS if name != "dmd2_frames"]  # which refuses them
every_method = pytest.mark.parametrize("name", TAKING)
# A method with options that change where its student's input comes from is tested with each.
every_variant = pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in TAKING), ("dmd2", {"rollout": "data"})], ids=str
)
STEPS = range(2)
COUNT, FRAMES, GIVEN = 3, 4, 2


class FreeFrames(RandomStreams):
    """Streams that draw for whole videos and keep the frames that are not given."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) < 5:
            return self._free(shape[0], lambda count: super(FreeFrames, self).normal((count, *shape[1:]), dtype))
        return super().normal((*shape[:2], FRAMES, *shape[3:]), dtype)[:, :, GIVEN:]

    def uniform(self, count: int) -> Tensor:
        return self._free(count, super().uniform)

    def index(self, count: int, high: int) -> Tensor:
        return self._free(count, lambda more: super(FreeFrames, self).index(more, high))

    def _free(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        """One draw per frame (chunks of one) is one of a whole video; any other is as it is."""
        if count != COUNT * (FRAMES - GIVEN):
            return draw(count)
        return draw(COUNT * FRAMES).view(COUNT, FRAMES, -1)[:, GIVEN:].flatten()


def losses_of(method: DistillMethod[Any], batch: Batch) -> dict[str, Tensor]:
    """Every loss, metric and parameter gradient of a few steps."""
    found: dict[str, Tensor] = {}
    for step in STEPS:
        for loss in method.losses(batch, step):
            loss.value.backward()
            found[f"{step} {loss.role}"] = loss.value.detach()
            metrics = {name: value for name, value in loss.metrics.items() if "chunk" not in name}
            found |= {f"{step} {loss.role} {name}": value for name, value in metrics.items()}
    for handle in method.bundle:
        for name, parameter in handle.network.named_parameters():
            if parameter.grad is not None:
                found[f"{handle.name} {name}"] = parameter.grad
    return found


def made(name: str, frames: int = FRAMES, **options: Any) -> tuple[DistillMethod[Any], SpyAdapter, Batch]:
    """A method, its recording family, and a batch of whole videos."""
    adapter = spy((1, frames, 4, 4))
    whole = analytic_batch(spy((1, FRAMES, 4, 4)), COUNT)
    assert whole.x0 is not None
    shape = (COUNT, 1, frames, 4, 4)
    rng = RandomStreams(3) if frames == FRAMES else FreeFrames(3)
    if issubclass(load_method(name).Config, CausalOptions):
        options["reach"] = Reach(frames)  # one chunk, so that there are as many draws for fewer frames
    if name == "streaming_tuning":
        options["max_frames"] = frames
    method = toy_method(name, adapter, mean=-0.5, std=1.2, rng=rng, **options)
    assert whole.trajectory is not None
    walk = Trajectory(whole.trajectory.states[:, :, :, FRAMES - frames :], whole.trajectory.times)
    return method, adapter, replace(whole, shape=shape, x0=whole.x0[:, :, FRAMES - frames :], trajectory=walk)


@every_variant
def test_given_frames_count_in_no_loss_and_no_normaliser(name: str, options: dict[str, Any]) -> None:
    """Elements of the analytic family are independent, so the free frames alone give the same losses and gradients."""
    method, _, batch = made(name, **options)
    found = losses_of(method, with_given(batch, GIVEN))
    alone, _, shorter = made(name, FRAMES - GIVEN, **options)
    expected = losses_of(alone, shorter)
    expected = {key: value for key, value in expected.items() if not key.endswith("_chunk")}  # of whole videos alone
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@every_variant
def test_every_role_sees_given_frames_clean_at_time_zero(name: str, options: dict[str, Any]) -> None:
    method, adapter, batch = made(name, **options)
    losses_of(method, with_given(batch, GIVEN))
    calls = [*adapter.calls, *adapter.feature_calls]
    seeing = {h.name for h in method.bundle for call in calls if call.network is h.network}
    assert seeing == set(method.bundle.roles) - set(
        method.heads(method.config, dict.fromkeys(method.bundle.roles, adapter))
    )
    assert batch.x0 is not None
    for call in calls:
        assert torch.equal(call.x_t[:, :, :GIVEN], batch.x0[:, :, :GIVEN])
        assert call.t.shape == (COUNT, FRAMES)
        assert torch.count_nonzero(call.t[:, :GIVEN]) == 0
        assert (call.t[:, GIVEN:] > 0).all() or name == "causvid"  # whose chunks may be clean data
        assert not torch.equal(call.x_t[:, :, GIVEN:], batch.x0[:, :, GIVEN:])


@every_variant
def test_no_gradient_reaches_what_the_student_says_of_given_frames(name: str, options: dict[str, Any]) -> None:
    method, adapter, batch = made(name, **options)
    losses_of(method, with_given(batch, GIVEN))
    gradients = [call.output.grad for call in adapter.calls if call.output.grad is not None]
    assert gradients
    for gradient in gradients:
        assert torch.count_nonzero(gradient[:, :, :GIVEN]) == 0
        assert gradient[:, :, GIVEN:].abs().sum() > 0


@every_method
def test_sampling_gives_the_network_the_input_of_training(name: str) -> None:
    """The declared sampler over a role, from any state: given frames are clean, the rest is untouched."""
    method, adapter, batch = made(name)
    batch = with_given(batch, GIVEN)
    student, streams = method.bundle["student"], RandomStreams(4)
    states: list[tuple[Tensor, Tensor]] = []

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        states.append((x_t, t))
        return student.guided_velocity(x_t, t, batch.condition, batch.negative, 2.0, r=r)

    x0 = generate(method.sampler, velocity, streams.normal(batch.shape), LADDER.times, streams.normal_like)
    assert batch.x0 is not None
    torch.testing.assert_close(x0[:, :, :GIVEN], batch.x0[:, :, :GIVEN], rtol=0, atol=1e-5)
    sampled = list(adapter.calls)
    adapter.calls.clear()
    for x_t, t in states:
        student.velocity(x_t, t, batch.condition)
        student.x0(x_t, t, batch.negative)
    assert len(sampled) == len(adapter.calls) == 2 * len(LADDER)
    for one, other in zip(sampled, adapter.calls, strict=True):
        assert torch.equal(one.x_t, other.x_t)
        assert torch.equal(one.t, other.t)
        assert torch.equal(one.x_t[:, :, :GIVEN], batch.x0[:, :, :GIVEN])


def role(adapter: SpyAdapter, kind: str = "denoiser") -> RoleHandle:
    return RoleHandle("student", adapter, gaussian(adapter, kind), trainable=True)


def given_in(shape: tuple[int, ...], mask: list[list[bool]]) -> Given:
    return Given(torch.tensor(mask), normal(shape, seeded(7)))


MIXED = [[True, False, False], [False, False, False], [False, True, True]]
"""Another mask for every sample, one of them without a given frame."""


def test_a_role_knows_the_velocity_of_given_frames() -> None:
    adapter, shape = spy((1, 3, 2, 2)), (3, 1, 3, 2, 2)
    given, noise, x0 = given_in(shape, MIXED), normal(shape, seeded(1)), normal(shape, seeded(2))
    x0, t = given.fill(x0), torch.tensor([0.9, 0.5, 0.001])
    x_t, condition = add_noise(x0, noise, t), Condition(adapter.conditioner.negative(3).tensors, given)
    found = role(adapter).velocity(x_t, t, condition)
    mask = given.frames.expand(shape)
    torch.testing.assert_close(found[mask], velocity_target(x0, noise)[mask], rtol=0, atol=1e-3)
    estimate = role(adapter).x0(x_t, t, condition)
    assert torch.equal(estimate[mask], x0[mask])
    guided = role(adapter).x0_guided(x_t, t, condition, condition, 3.0)
    assert torch.equal(guided[mask], x0[mask])


def test_a_sample_without_given_frames_is_treated_as_ever() -> None:
    adapter, shape = spy((1, 3, 2, 2)), (3, 1, 3, 2, 2)
    x_t, t = normal(shape, seeded(1)), torch.tensor([0.9, 0.5, 0.1])
    text = adapter.conditioner.negative(3)
    plain = role(adapter).velocity(x_t, t, text)
    mixed = role(adapter).velocity(x_t, t, replace(text, given=given_in(shape, MIXED)))
    torch.testing.assert_close(mixed[1], plain[1])
    torch.testing.assert_close(mixed[0, :, 1:], plain[0, :, 1:])  # the analytic family's frames are independent


def test_a_consistency_network_stays_finite_on_clean_frames() -> None:
    adapter, shape = spy((1, 3, 2, 2)), (3, 1, 3, 2, 2)
    condition = Condition(adapter.conditioner.negative(3).tensors, given_in(shape, MIXED))
    student = role(adapter, "consistency")
    student.x0(normal(shape, seeded(1)), torch.ones(3), condition).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())


def test_means_leave_given_frames_out_and_weigh_samples_alike() -> None:
    x = torch.arange(12.0).view(3, 1, 4, 1, 1)
    mask = torch.tensor([[True, False, False, False], [False] * 4, [True, True, True, False]])
    given = Given(mask, torch.full_like(x, torch.nan))
    assert mean_over_generated(x, given).flatten().tolist() == [2.0, 5.5, 11.0]
    condition = Condition({}, given)
    assert float(Batch((3, 1, 4, 1, 1), condition, condition).mean(x)) == pytest.approx((2.0 + 5.5 + 11.0) / 3)
    assert torch.equal(mean_over_generated(x, None), x.mean(dim=(1, 2, 3, 4), keepdim=True))


def test_given_frames_travel_with_the_condition() -> None:
    shape = (3, 1, 3, 2, 2)
    given = given_in(shape, MIXED)
    text, other = Condition({"a": {"x": torch.ones(3, 2)}}), Condition({"a": {"x": torch.zeros(3, 2)}})
    joined = text | Condition({"b": {"x": torch.ones(3)}}, given)
    assert joined.given is given
    assert set(joined.tensors) == {"a", "b"}
    assert (Condition({}, given) | text).given is given
    batch = Batch(shape, replace(text, given=given), replace(other, given=given))
    dropped = without_captions(batch, torch.tensor([True, False, True]))
    assert dropped.given is given
    rows = replace(text, given=given).rows(slice(1, 3))
    assert rows.given is not None
    assert torch.equal(rows.given.mask, given.mask[1:])
    assert torch.equal(rows.given.clean, given.clean[1:])
    with pytest.raises(ValueError, match="the same conditioning frames"):
        Batch(shape, replace(text, given=given), other)
