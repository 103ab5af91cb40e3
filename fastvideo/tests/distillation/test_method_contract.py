"""What every registered method must obey; a method is tested here from the moment it is registered."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching import flow_map_loss
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, RawBatch, UserError
from fastvideo.tests.distillation.tiny import wan_config
from fastvideo.tests.distillation.toys import (
    LADDER,
    MEAN,
    STD,
    SpyAdapter,
    analytic_batch,
    moments,
    spy,
    toy_method,
    toy_of,
    train,
    trajectory_extras,
)
from fastvideo.tests.preparing import preparer

every_method = pytest.mark.parametrize("name", METHODS)
STEPS = range(4)
ORDER = torch.tensor([2, 0, 3, 1])


class ReorderedStreams(RandomStreams):
    """Streams that give every sample of a reordered batch what it would have drawn in the original order."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return super().normal(shape, dtype)[ORDER]

    def uniform(self, count: int) -> Tensor:
        return super().uniform(count)[ORDER]

    def index(self, count: int, high: int) -> Tensor:
        return super().index(count, high)[ORDER]


def parameters(bundle: ModelBundle) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, by role and name."""
    return {f"{h.name}.{key}": value.clone() for h in bundle for key, value in h.network.state_dict().items()}


def with_gradient(bundle: ModelBundle) -> set[str]:
    """The roles that hold a gradient."""
    return {h.name for h in bundle for p in h.network.parameters() if p.grad is not None}


@every_method
def test_it_declares_itself(name: str) -> None:
    cls = load_method(name)
    assert cls.summary
    assert cls.trainable_roles
    assert not set(cls.trainable_roles) & set(cls.frozen_roles)
    config = cls.Config()
    assert set(cls.optimizers(config)) == set(cls.trainable_roles)


@every_method
def test_every_active_role_and_no_other_is_trained_in_turn(name: str, adapter: SpyAdapter) -> None:
    method, batch = toy_method(name, adapter), analytic_batch(adapter, 4)
    ever = set()
    for step in STEPS:
        roles = [loss.role for loss in method.losses(batch, step)]
        assert tuple(dict.fromkeys(roles)) == method.active_roles(step)
        ever |= set(roles)
    assert ever == set(method.trainable_roles)


@every_method
def test_a_loss_is_a_finite_scalar_with_scalar_metrics_off_the_graph(name: str, adapter: SpyAdapter) -> None:
    method, batch = toy_method(name, adapter, mean=-0.5, std=1.2), analytic_batch(adapter, 4)
    for step in STEPS:
        for loss in method.losses(batch, step):
            assert loss.value.shape == ()
            assert loss.value.dtype == torch.float32
            assert loss.value.isfinite()
            assert loss.value.requires_grad
            assert all(m.shape == () and not m.requires_grad for m in loss.metrics.values())


@every_method
def test_backward_of_a_loss_reaches_its_role_alone(name: str, adapter: SpyAdapter) -> None:
    method, batch = toy_method(name, adapter, mean=-0.5, std=1.2), analytic_batch(adapter, 4)
    for step in STEPS:
        for loss in method.losses(batch, step):
            loss.value.backward()
            assert with_gradient(method.bundle) == {loss.role}
            method.bundle[loss.role].network.zero_grad()


@every_method
@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_mode_never_leaks_to_the_trainer(name: str, enabled: bool, adapter: SpyAdapter) -> None:
    method, batch = toy_method(name, adapter), analytic_batch(adapter, 4)
    with torch.set_grad_enabled(enabled):
        for step in STEPS:
            for _ in method.losses(batch, step):
                assert torch.is_grad_enabled() == enabled
            assert torch.is_grad_enabled() == enabled


@every_method
def test_frozen_roles_stay_bit_identical_and_trained_ones_move(name: str, adapter: SpyAdapter) -> None:
    method = toy_method(name, adapter, mean=-0.5, std=1.2)
    before = parameters(method.bundle)
    batch = analytic_batch(adapter, 4)
    train(method, lambda step: batch, 3, dict.fromkeys(method.trainable_roles, 1e-2), final_rate=1.0)
    after = parameters(method.bundle)
    for key, value in before.items():
        trained = key.split(".")[0] in method.trainable_roles and not key.endswith("log_weight")
        assert torch.equal(value, after[key]) != trained, key


@every_method
def test_draws_come_from_the_methods_own_streams(name: str, adapter: SpyAdapter) -> None:
    before = torch.get_rng_state()
    batch, values = analytic_batch(adapter, 4), []
    for seed in (1, 1, 2):
        method = toy_method(name, adapter, mean=-0.5, std=1.2, rng=RandomStreams(seed))
        values.append([float(loss.value.detach()) for step in STEPS for loss in method.losses(batch, step)])
    assert values[0] == values[1]
    assert values[0] != values[2]
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_latents_are_asked_for_where_they_are_used_and_nowhere_else(name: str, adapter: SpyAdapter) -> None:
    """The trainer's data may be prompts alone: a method that uses clean latents refuses them with one message."""
    method, batch = toy_method(name, adapter), analytic_batch(adapter, 4, latents=False)
    if method.uses_latents(method.config):
        with pytest.raises(UserError, match=r"clean latents|trajectories"):
            _ = [list(method.losses(batch, step)) for step in STEPS]
    else:
        losses = list(method.losses(batch, 0))
        assert losses
        assert all(loss.value.isfinite() for loss in losses)


def move_apart(method: DistillMethod[Any]) -> None:
    """Give every trained role other weights: equal teacher and critic would leave no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in method.trainable_roles:
            for parameter in method.bundle[role].parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def output_gradients(method: DistillMethod[Any], adapter: SpyAdapter, batch: Batch) -> list[Tensor]:
    """Gradient of every loss of a few steps with respect to every network output that it came from."""
    for step in STEPS:
        for loss in method.losses(batch, step):
            loss.value.backward()
    return [call.output.grad for call in adapter.calls if call.output.grad is not None]


@every_method
def test_reordering_the_batch_reorders_the_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, even = [], flow_map_loss.positions
    for streams in (RandomStreams(3), ReorderedStreams(3)):
        order = ORDER if isinstance(streams, ReorderedStreams) else slice(None)
        monkeypatch.setattr(flow_map_loss, "positions", lambda rng, count, order=order: even(rng, count)[order])
        adapter = spy()
        batch = analytic_batch(adapter, 4, captions=("0", "0.5", "1", "-1"))
        if isinstance(streams, ReorderedStreams):
            assert batch.x0 is not None
            condition = batch.condition.map(lambda value: value[ORDER])
            assert batch.trajectory is not None
            walk = Trajectory(batch.trajectory.states[ORDER], batch.trajectory.times[ORDER])
            batch = Batch(batch.shape, condition, batch.negative, batch.x0[ORDER], walk)
        method = toy_method(name, adapter, mean=-0.5, std=1.2, rng=streams)
        found.append(output_gradients(method, adapter, batch))
    assert torch.stack([one.abs().sum(dim=(1, 2, 3, 4)) for one in found[0]]).sum(0).min() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one[ORDER], other, rtol=1e-4, atol=1e-7)


@every_method
def test_a_sample_does_not_feel_another_one(name: str) -> None:
    found = []
    for last in ("1", "50"):
        adapter = spy()
        method = toy_method(name, adapter, mean=-0.5, std=1.2)
        found.append(output_gradients(method, adapter, analytic_batch(adapter, 3, captions=("0", "0.5", last))))
    assert found[0], "nothing reached an output, so nothing was compared"
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[:2], other[:2])


@every_method
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_truth_is_a_fixed_point_that_attracts(name: str, offset: float) -> None:
    adapter = spy((1, 1, 8, 8))
    method = toy_method(name, adapter, mean=MEAN + offset)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return analytic_batch(adapter, 64, seed=step)

    rates = {**dict.fromkeys(method.trainable_roles, 1e-3), **toy_of(name).rates}
    train(method, batches, 100, {role: 2 * rate for role, rate in rates.items()})  # a student may move 0.1
    mean, std = moments(method.bundle["student"])
    if offset:
        assert MEAN + 0.01 < mean < MEAN + offset - 0.02, "it moves towards the truth, and cannot be there yet"
    else:
        assert (mean, std) == pytest.approx((MEAN, STD), abs=0.01)


@every_method
def test_the_declared_sampler_reproduces_the_truth(name: str) -> None:
    adapter, toy = spy((1, 1, 6, 5)), toy_of(name)
    method, streams = toy_method(name, adapter), RandomStreams(4)
    condition = adapter.conditioner.negative(2000)

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        adapter.calls.clear()
        return method.bundle["student"].velocity(x_t, t, condition, r=r)

    noise = streams.normal((2000, *adapter.codec.latent_shape))
    x0 = generate(method.sampler, velocity, noise, toy.sampler.times, streams.normal_like)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.var()) == pytest.approx(STD**2, rel=0.02)


@pytest.fixture(scope="module")
def wan(tiny_wan: Path) -> WanFamily:
    """Toy Wan in bfloat16, which knows the empty prompt."""
    family = WanFamily(wan_config(tiny_wan, precision="bfloat16"))
    family.ensure_negative_conditioning()
    return family


@pytest.fixture(scope="module")
def network(wan: WanFamily) -> nn.Module:
    """Its network, for copies."""
    return wan.folder.load_network()


@every_method
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch: RMSNorm runs unfused
def test_bfloat16_forwards_over_float32_weights_stay_finite(name: str, wan: WanFamily, network: nn.Module) -> None:
    cls, toy = load_method(name), toy_of(name)
    config = cls.Config(**toy.config)
    networks = {role: deepcopy(network) for role in (*cls.trainable_roles, *cls.frozen_roles, *toy.optional)}
    if "flow_map" in cls.needs_of(config):
        wan.folder.add_flow_map(networks["student"])
    networks |= cls.heads(config, dict.fromkeys(networks, wan))
    handles = [RoleHandle(role, wan, network, role in cls.trainable_roles) for role, network in networks.items()]
    method = cls(config, ModelBundle(handles), LADDER, RandomStreams(3))
    move_apart(method)
    latents = RandomStreams(1).normal((2, *wan.codec.latent_shape))
    walk = trajectory_extras(latents[:, None].expand(-1, len(LADDER), -1, -1, -1, -1))
    for loss in method.losses(preparer(wan)(RawBatch(("red seven", "a three"), latents, walk)), 0):
        loss.value.backward()
        assert loss.value.dtype == torch.float32
        assert loss.value.isfinite()
        for key, parameter in method.bundle[loss.role].network.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
        norm = sum(float(p.grad.norm()) for p in method.bundle[loss.role].parameters() if p.grad is not None)
        assert norm > 0
