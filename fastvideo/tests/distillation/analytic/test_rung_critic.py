"""``critic_sees_rung``: a critic that is told a sample's ladder step learns each step's score, not their mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic_networks import SiteMLP
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.registry import load_method, run_schema
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Condition, UserError
from fastvideo.tests.distillation.analytic.test_cadence import values
from fastvideo.tests.distillation.toys import SpyAdapter, analytic_batch, gaussian, spy, toy_method, train

TIMES = (1.0, 0.5)
MEANS, STDS = (-1.0, 1.0), (0.4, 0.2)
"""Of the student's samples at either step of the ladder."""


class TwoSteps(nn.Module):
    """Student that makes N(MEANS[i], STDS[i]^2) in ``i + 1`` calls over TIMES."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        time = float(t[0])
        if time == 1.0:
            x0 = MEANS[0] + STDS[0] * x_t
        else:
            spread = ((1 - time) ** 2 * STDS[0] ** 2 + time**2) ** 0.5
            x0 = MEANS[1] + STDS[1] * (x_t - (1 - time) * MEANS[0]) / spread
        return (x_t - x0) / time + 0 * self.anchor


def two_steps(adapter: SpyAdapter, interval: int = 10**6, name: str = "dmd2", **options: Any) -> DMD2Method:
    """DMD2 with that student, which is updated on every ``interval``-th step, and a critic that has to be learnt."""
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        "student": TwoSteps(),
        "teacher": gaussian(adapter, "denoiser"),
        "critic": SiteMLP(1),
    }
    method = load_method(name)
    config = method.Config(**{"teacher_guidance": 1.0, "generator_update_interval": interval, **options})
    networks |= method.heads(config, dict.fromkeys(networks, adapter))
    handles = [RoleHandle(n, adapter, network, trainable=n != "teacher") for n, network in networks.items()]
    built = method(config, ModelBundle(handles), Ladder(TIMES), RandomStreams(3))
    assert isinstance(built, DMD2Method)
    return built


def velocity_of(x: Tensor, t: float, mean: float, std: float) -> Tensor:
    """``E[noise - x0 | x_t]`` of N(mean, std^2)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean


def errors(method: DMD2Method, adapter: SpyAdapter, condition: Condition) -> list[float]:
    """Rms distance of the critic's velocity at t = 0.5 from the truth, for samples of either step."""
    found, t = [], 0.5
    for rung, mean, std in zip(TIMES, MEANS, STDS, strict=True):
        method.rungs.latest = rung
        noise = torch.randn((64, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(1))
        x = (1 - t) * mean + ((1 - t) ** 2 * std**2 + t**2) ** 0.5 * noise
        times = torch.full((64,), t)
        u = method.critic.velocity(x, times, condition, r=method.rungs.second_time(times))
        found.append(float((u - velocity_of(x, t, mean, std)).square().mean().sqrt()))
    return found


def test_a_critic_that_is_told_learns_the_score_of_each_step() -> None:
    found = {}
    for told in (True, False):
        adapter = spy((1, 1, 4, 4))
        method = two_steps(adapter, critic_sees_rung=told)
        batch = analytic_batch(adapter, 64, latents=False)
        train(method, dict.fromkeys(range(200), batch).__getitem__, 200, {"student": 0.0, "critic": 5e-3})
        with torch.no_grad():
            found[told] = errors(method, adapter, batch.condition)
    assert max(found[True]) < 0.12
    assert min(found[False]) > 1.0, "one critic of both answers their mixture"


@pytest.mark.parametrize("rollout", ["simulate", "data"])
@pytest.mark.parametrize(
    ("name", "options"), [("dmd2", {}), ("dmd2", {"score_and_train": True}), ("dmd2_gan", {}), ("f_distill", {})]
)
def test_every_call_of_the_critic_and_no_other_names_the_step(name: str, options: Any, rollout: str) -> None:
    adapter = spy((1, 1, 4, 4))
    method = two_steps(adapter, 2, name, critic_sees_rung=True, rollout=rollout, **options)
    for step in range(8):
        adapter.calls.clear()
        list(method.losses(analytic_batch(adapter, 3), step))
        ends = torch.as_tensor(adapter.of(method.student)[-1].t)
        calls = adapter.of(method.critic)
        assert calls
        for call in calls:
            assert call.r is not None
            torch.testing.assert_close(call.t - call.r, ends - TIMES[-1])
        assert all(call.r is None for call in (*adapter.of(method.student), *adapter.of(method.teacher)))


def test_the_critic_of_all_steps_is_called_as_ever(adapter: SpyAdapter) -> None:
    method = toy_method("dmd2", adapter)
    list(method.losses(analytic_batch(adapter, 2), 0))
    assert [call.r for call in adapter.of(method.bundle["critic"])] == [None, None]


REFUSED = ["rcm", "anyflow", "causvid", "phased_dmd"]


@pytest.mark.parametrize("name", REFUSED)
def test_methods_whose_samples_are_of_no_one_step_refuse_it(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.critic_sees_rung: must be false for this method: .*"):
        validate(run_schema("analytic", name), values(name, critic_sees_rung=True), "test")


def test_real_videos_are_not_read_through_a_critic_that_is_told() -> None:
    options = {"critic_sees_rung": True, "features_of": "critic"}
    with pytest.raises(UserError, match="real videos have no ladder step"):
        validate(run_schema("analytic", "dmd2_gan"), values("dmd2_gan", **options), "test")
