"""What every registered method must obey; a method is tested here from the moment it is registered."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.conformance.method_checks import METHOD_CHECKS
from fastvideo.conformance.method_subject import backward
from fastvideo.conformance.subject import Check, NotApplicable
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching import flow_map_loss
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, RawBatch
from fastvideo.tests.distillation.tiny import wan_config
from fastvideo.tests.distillation.toys import (
    LADDER,
    MEAN,
    STD,
    SpyAdapter,
    analytic_batch,
    moments,
    spy,
    subject_of,
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


@every_method
@pytest.mark.parametrize("rule", METHOD_CHECKS, ids=lambda rule: rule.name.replace(" ", "_"))
def test_it_obeys(rule: Check, name: str) -> None:
    """The rules of ``fastvideo conformance METHOD``."""
    with suppress(NotApplicable):
        rule.run(subject_of(name))


@every_method
def test_trained_roles_move_and_frozen_ones_do_not(name: str, adapter: SpyAdapter) -> None:
    method = toy_method(name, adapter, mean=-0.5, std=1.2)
    before = parameters(method.bundle)
    batch = analytic_batch(adapter, 4)
    train(method, lambda step: batch, 3, dict.fromkeys(method.trainable_roles, 1e-2), final_rate=1.0)
    after = parameters(method.bundle)
    for key, value in before.items():
        trained = key.split(".")[0] in method.trainable_roles and not key.endswith("log_weight")
        assert torch.equal(value, after[key]) != trained, key


@every_method
def test_every_trained_role_is_active_within_four_steps(name: str, adapter: SpyAdapter) -> None:
    method = toy_method(name, adapter)
    assert {role for step in STEPS for role in method.active_roles(step)} == set(method.trainable_roles)


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
            backward(method, loss)
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
        backward(method, loss)
        assert loss.value.dtype == torch.float32
        assert loss.value.isfinite()
        for key, parameter in method.bundle[loss.role].network.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
        norm = sum(float(p.grad.norm()) for p in method.bundle[loss.role].parameters() if p.grad is not None)
        assert norm > 0
