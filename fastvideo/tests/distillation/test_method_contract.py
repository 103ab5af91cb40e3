"""What every registered method must obey; a method is tested here from the moment it is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.conformance.method_checks import METHOD_CHECKS
from fastvideo.conformance.method_subject import backward
from fastvideo.conformance.run import conform_method, idle_roles
from fastvideo.conformance.subject import Check, NotApplicable
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.bundle import ModelBundle, RoleHandle, frozen
from fastvideo.distillation.copying import copy_role
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching import flow_map_loss
from fastvideo.distillation.methods.fine_tuning.sft import SFTConfig, SFTMethod
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.samplers import generate
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, RawBatch, RoleLoss, UserError
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
def test_its_defaults_obey_too(name: str) -> None:
    """The plain command, with and without optional roles."""
    options = {"balance": False} if name.startswith("anyflow") else {}
    assert [outcome for outcome in conform_method(load_method(name), options) if outcome.result == "FAILED"] == []


Losses = Callable[[SFTMethod, Batch, int], Any]


def findings(losses: Losses, **members: Any) -> dict[str, str]:
    """What is found of a small method: the message of each check that does not pass, by its name."""
    cls = type("Mine", (SFTMethod,), {"losses": losses, **members})
    return {outcome.name: outcome.message for outcome in conform_method(cls, {}) if outcome.result != "passed"}


def usual(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    return SFTMethod.losses(method, batch, step)


def changing(change: Callable[[RoleLoss], Any]) -> Losses:
    return lambda method, batch, step: (change(loss) for loss in SFTMethod.losses(method, batch, step))


def one_step(method: SFTMethod, batch: Batch, noise: Tensor) -> RoleLoss:
    x0 = method.bundle["student"].x0(noise, full_time(noise, 1.0), batch.condition)
    return RoleLoss("student", batch.mean((x0 - batch.latents).square()))


def copies_first(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    method.bundle["teacher"].network.load_state_dict(method.bundle["student"].network.state_dict())
    yield from usual(method, batch, step)


def copies_last(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    yield from usual(method, batch, step)
    if step == 3:
        method.bundle["teacher"].network.load_state_dict(method.bundle["student"].network.state_dict())


def begins_alike(method: SFTMethod, *given: Any) -> None:
    SFTMethod.__init__(method, *given)
    method.bundle["teacher"].network.load_state_dict(method.bundle["student"].network.state_dict())


def yields_in_autocast(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    found = list(usual(method, batch, step))
    with torch.autocast("cpu", torch.bfloat16):
        yield from found


def yields_frozen(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    found = list(usual(method, batch, step))
    with frozen([method.bundle["student"]]):
        yield from found


def ends_without_grad(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    yield from usual(method, batch, step)
    torch.set_grad_enabled(False)


def idles(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    return iter(()) if step % 2 else usual(method, batch, step)


def reads_x0(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    assert batch.x0 is not None
    yield from usual(method, batch, step)


def refuses_all(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    raise UserError("not today")


def asks_for_optional(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    assert method.bundle.get("teacher") is None
    yield from usual(method, batch, step)


FROZEN, LEAK, SCALAR = "frozen roles stay the same to the bit", "no mode leaks to the trainer", "a loss is a finite"
ACTIVE, DRAWS, LATENTS = "every active role and no", "draws come from the methods own", "latents are asked for"
DECLARES, WITH_TEACHER = "it declares itself", {"frozen_roles": ("teacher",)}
PROMPTS_ALONE = {"uses_latents": staticmethod(lambda config: False)}


@pytest.mark.parametrize(
    ("losses", "members", "rule", "message"),
    [
        (copies_first, WITH_TEACHER, FROZEN, "step 0 changed frozen roles: teacher"),
        (copies_last, WITH_TEACHER, FROZEN, "step 3 changed frozen roles: teacher"),
        (copies_first, {**WITH_TEACHER, "__init__": begins_alike}, FROZEN, "step 0 changed frozen roles: teacher"),
        (yields_in_autocast, {}, LEAK, "'student': where it is yielded, autocast is on"),
        (yields_frozen, {}, LEAK, "where it is yielded, student is frozen"),
        (ends_without_grad, {}, LEAK, "step 0: around it, gradients are switched off"),
        (usual, {"trainable_roles": "student"}, DECLARES, "expected a tuple, such as ('student',)"),
        (usual, {"sampler": "ddim"}, DECLARES, "sampler is 'ddim', expected one of renoise, euler, flow_map"),
        (usual, {"averaged_roles": ("critic",)}, DECLARES, "averaged_roles name critic"),
        (changing(lambda loss: replace(loss, value=0.5)), {}, ACTIVE, "has a float as value; give a scalar tensor"),
        (changing(lambda loss: replace(loss, metrics={"a": 0.5})), {}, SCALAR, "has a float as metric 'a'"),
        (changing(lambda loss: (loss.role, loss.value)), {}, ACTIVE, "losses yields a tuple, not a RoleLoss"),
        (lambda method, batch, step: None, {}, ACTIVE, "step 0: losses returns a NoneType; yield every RoleLoss"),
        (lambda *given: next(usual(*given)), {}, ACTIVE, "losses returns a RoleLoss; yield every RoleLoss"),
        (changing(lambda loss: replace(loss, role="studnet")), {}, SCALAR, "of no active role; active_roles(0) are st"),
        (changing(lambda loss: replace(loss, frozen=("critc",))), {}, SCALAR, "names critc; the roles are student"),
        (changing(lambda loss: replace(loss, value=loss.value.double())), {}, SCALAR, "expected a float32 scalar"),
        (changing(lambda loss: replace(loss, value=loss.value.detach())), {}, SCALAR, "has no gradient: nothing"),
        (changing(lambda loss: replace(loss, value=loss.value * torch.nan)), {}, DRAWS, "is not finite"),
        (changing(lambda loss: replace(loss, value=loss.value * 0)), {}, DRAWS, "another seed gives the same losses"),
        (lambda method, batch, step: iter([batch.trajectory.states]), {}, ACTIVE, "'NoneType' object has no"),
        (idles, {}, ACTIVE, "step 1: losses for [], active are ['student']"),
        (reads_x0, PROMPTS_ALONE, LATENTS, "uses_latents is False, and without latents: Asser"),
        (refuses_all, PROMPTS_ALONE, LATENTS, "UserError: not today"),
        (asks_for_optional, {"optional_roles": ("teacher",)}, ACTIVE, "with the optional teacher: AssertionError"),
    ],
)
def test_what_a_run_would_regret_is_found(losses: Losses, members: dict[str, Any], rule: str, message: str) -> None:
    with torch.enable_grad():  # one leaves it switched off
        (found,) = [said for name, said in findings(losses, **members).items() if name.startswith(rule)]
    assert message in found


def penalised(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    """A penalty on a gradient, as WGAN-GP has: it needs the gradient mode of a run."""
    x = method.rng.normal_like(batch.latents).requires_grad_()
    velocity = method.bundle["student"].velocity(x, full_time(x, 0.5), batch.condition)
    (gradient,) = torch.autograd.grad(velocity.square().sum(), x, create_graph=True)
    yield RoleLoss("student", batch.mean((gradient - 1).square()))


def temporal(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    x = method.rng.normal_like(batch.latents)
    velocity = method.bundle["student"].velocity(x, full_time(x, 0.5), batch.condition)
    assert x.shape[2] > 1
    yield RoleLoss("student", (velocity[:, :, 1:] - velocity[:, :, :-1]).square().mean())


def late(method: SFTMethod, batch: Batch, step: int) -> Iterator[RoleLoss]:
    x = method.rng.normal(batch.shape)
    velocity = method.bundle["student"].velocity(x, full_time(x, 0.5), batch.condition)
    yield RoleLoss("student", batch.mean((velocity - (batch.latents if step > 9 else 0)).square()))


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (penalised, {}),
        (temporal, {}),
        (late, {}),
        (lambda self, batch, step: iter([one_step(self, batch, self.rng.normal(batch.shape))]), {}),
        (
            lambda self, batch, step: iter([one_step(self, batch, torch.ones(batch.shape))]),
            {"draws come from the methods own streams": "it draws nothing from self.rng"},
        ),
    ],
    ids=["gradient_penalty", "temporal", "late_latents", "one_step", "no_draws"],
)
def test_unusual_methods_obey(losses: Losses, found: dict[str, str]) -> None:
    assert findings(losses) == found


class Warming(SFTMethod):
    """A student that waits for its critic, which it replaces once."""

    trainable_roles = ("student", "critic")
    sampler = "renoise"

    @classmethod
    def optimizers(cls, config: Any) -> Any:
        assert isinstance(config, SFTConfig)
        return dict.fromkeys(cls.trainable_roles, config.optimizer_of(1e-4))

    def active_roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        copy_role(self.bundle["student"], self.bundle["critic"])
        yield from super().losses(batch, step)


def test_a_role_that_no_step_trains_is_named_and_can_be_copied_to() -> None:
    assert idle_roles(Warming, {}) == ["critic"]
    assert idle_roles(SFTMethod, {}) == []
    assert {outcome.result for outcome in conform_method(Warming, {})} == {"passed"}


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
