"""sCM and rCM with a reach: tangents of chunks on their clean past in closed form, and rollouts that stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic_networks import FrameConsistency, FrameDenoiser
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.chunks import Masked, Past, Reach
from fastvideo.distillation.config.causal import streaming
from fastvideo.distillation.methods.consistency_model.scm import LossWeight, SCMConfig, SCMMethod
from fastvideo.distillation.methods.distribution_matching.rcm import RCMConfig, RCMMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.types import Batch
from fastvideo.tests.distillation.analytic.test_causal_analytic import REST, A, Spy, batch_of
from fastvideo.tests.distillation.toys import LADDER, train

REACH = Reach(1)
ANGLE = torch.tensor([0.2, 0.7, 1.1, 1.4])


def forced(method: str, adapter: Spy, student: nn.Module | None = None, **options: Any) -> SCMMethod | RCMMethod:
    """A method on teacher forcing, with the exact student unless another is given."""
    networks = {"student": student or FrameConsistency(0.0, 1.0, A), "teacher": FrameDenoiser(0.0, 1.0, A)}
    networks |= {"loss_weight": LossWeight()} if method == "scm" else {"critic": FrameDenoiser(0.0, 1.0, A)}
    bundle = ModelBundle([RoleHandle(name, adapter, one, name != "teacher") for name, one in networks.items()])
    shared = {"teacher_guidance": 1.0, "reach": REACH, **options}
    if method == "scm":
        return SCMMethod(SCMConfig(**shared), bundle, LADDER, RandomStreams(3))
    return RCMMethod(RCMConfig(consistency_steps=0, tangent_warmup_steps=0, **shared), bundle, LADDER, RandomStreams(3))


def tangent(method: SCMMethod | RCMMethod, batch: Batch, noise: Tensor) -> Tensor:
    """Before it is normalised."""
    found = method.tangent_and_error if isinstance(method, SCMMethod) else method.consistency_error
    return found(batch, ANGLE, noise, 1.0)[0].detach()


@pytest.mark.parametrize("method", ["scm", "rcm"])
def test_the_tangent_of_a_chunk_is_that_of_its_distribution_on_the_clean_past(method: str) -> None:
    """A diffusion model as the student: ``-cos s^2 sin (x - cos m) / V^2``, where the frame before says m and s."""
    adapter = Spy(3, 4)
    batch = batch_of(adapter, len(ANGLE))
    x0, noise = batch.latents, torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
    found = tangent(forced(method, adapter, FrameDenoiser(0.0, 1.0, A)), batch, noise)
    cos, sin = (value.view(-1, 1, 1, 1, 1) for value in (ANGLE.cos(), ANGLE.sin()))
    mean = torch.cat([torch.zeros_like(x0[:, :, :1]), A * x0[:, :, :-1]], dim=2)
    rest = torch.tensor([1.0, REST, REST]).view(1, 1, 3, 1, 1)
    expected = -cos * rest * sin * (cos * x0 + sin * noise - cos * mean) / (cos**2 * rest + sin**2) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert all(isinstance(context, Masked) and context.clean is x0 for context in adapter.contexts)


@pytest.mark.parametrize("method", ["scm", "rcm"])
def test_the_exact_causal_student_is_left_alone(method: str) -> None:
    adapter = Spy(3, 4)
    batch = batch_of(adapter, len(ANGLE))
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
    assert float(tangent(forced(method, adapter), batch, noise).abs().max()) < 2e-3
    assert float(tangent(forced(method, adapter, FrameConsistency(0.5, 1.0, A)), batch, noise).abs().max()) > 1e-2


@pytest.mark.parametrize("turn", [0, 2])
def test_a_rollout_of_rcm_streams_on_its_own_past(turn: int) -> None:
    """So frames of the exact student are correlated as the world's are; each chunk sees those before it."""
    adapter = Spy(3, 40)
    method = forced("rcm", adapter)
    assert isinstance(method, RCMMethod)
    with torch.no_grad():
        made = method.rollout(batch_of(adapter, 16), turn)
    frames = made.movedim(2, 0).flatten(1)
    expected = torch.tensor([[A ** abs(i - j) for j in range(3)] for i in range(3)])
    torch.testing.assert_close(torch.cov(frames), expected, rtol=0, atol=0.03)
    lengths = [context.length for context in adapter.contexts if isinstance(context, Past)]
    assert lengths == [chunk for chunk in range(3) for _ in range(turn + 1)]


def test_gradient_reaches_every_chunk_and_none_flows_through_the_past() -> None:
    adapter = Spy(3, 2)
    method = forced("rcm", adapter, FrameConsistency(0.2, 1.0, A))
    assert isinstance(method, RCMMethod)
    made, mean = method.rollout(batch_of(adapter, 2)), method.student.network.mean
    found = [float(torch.autograd.grad(made[:, :, i].mean(), mean, retain_graph=True)[0]) for i in range(3)]
    assert found == pytest.approx([1.0, 1 - A, 1 - A], abs=1e-4)  # of ``mean + A (the frame before - mean)``


def test_options_and_needs() -> None:
    for method, config in ((SCMMethod, SCMConfig), (RCMMethod, RCMConfig)):
        assert streaming(config()) is None
        assert streaming(config(reach=REACH)) is not None
        assert "chunks" not in method.needs_of(config())  # type: ignore[attr-defined]
        assert method.needs_of(config(reach=REACH)) == {"chunks", "jvp"}  # type: ignore[attr-defined]
        assert config(allow_bidirectional_teacher=True).trusts_teachers


def test_central_differences_of_a_forced_tangent_agree() -> None:
    adapter = Spy(3, 4)
    batch = batch_of(adapter, len(ANGLE))
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
    make = partial(forced, "scm", adapter, FrameDenoiser(0.1, 0.8, A))
    exact, near = (tangent(make(**options), batch, noise) for options in ({}, {"jvp": "central_difference"}))
    torch.testing.assert_close(exact, near, rtol=0.02, atol=0.02)


@pytest.mark.nightly
def test_scm_brings_a_causal_student_to_the_world() -> None:
    adapter, network = Spy(3, 20), FrameConsistency(0.4, 0.6, A)
    method = forced("scm", adapter, network, tangent_warmup_steps=200)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        adapter.contexts.clear()
        return batch_of(adapter, 8, seed=step)

    train(method, batches, 1500, {"student": 0.01, "loss_weight": 0.01})
    assert (float(network.mean.detach()), float(network.std.detach())) == pytest.approx((0.0, 1.0), abs=0.05)
