"""Flow maps: the head on real networks, the exact one, the sampler, and who is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import GaussianMeanVelocity
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.flow_map import HEAD, HEAD_FILE
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.samplers import flow_map, generate
from fastvideo.distillation.types import Condition, Given, UserError
from fastvideo.tests.distillation.tiny import FAMILIES
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, gaussian

networks = pytest.mark.parametrize("name", ["wan", "cogvideox"])
T, R = torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.0])


class Mapped:
    """A family with one of its networks as a flow map."""

    def __init__(self, name: str, root: Path) -> None:
        self.adapter: DistillAdapter[Any] = FAMILIES[name].make(root)
        self.network = self.adapter.folder.load_network()
        self.adapter.folder.add_flow_map(self.network)
        self.condition = self.adapter.conditioner.encode_prompts(FAMILIES[name].prompts)
        self.x = torch.randn(2, *self.adapter.codec.latent_shape)

    def velocity(self, r: Tensor | None = None, t: Tensor = T) -> Tensor:
        return self.adapter.velocity(self.network, self.x, t, self.condition, r=r)

    def train_head(self) -> None:
        """Another last layer, as training would leave it."""
        torch.nn.init.normal_(self.network.get_submodule(HEAD).last.weight, std=0.3)  # type: ignore[union-attr]


@pytest.fixture
def mapped(name: str, tiny_wan: Path) -> Mapped:
    return Mapped(name, tiny_wan.parent)


@networks
def test_a_new_flow_map_is_the_base_to_the_bit_for_every_r(mapped: Mapped) -> None:
    base = mapped.adapter.velocity(mapped.adapter.folder.load_network(), mapped.x, T, mapped.condition)
    for r in (None, R, T):
        assert torch.equal(mapped.velocity(r), base)


@networks
def test_a_trained_head_reads_the_span_and_nothing_where_r_is_t(mapped: Mapped) -> None:
    base = mapped.velocity()
    mapped.train_head()
    assert torch.equal(mapped.velocity(T), base)
    assert torch.equal(mapped.velocity(), base)
    for moved in (R, R + 0.1):
        assert not torch.allclose(mapped.velocity(moved), base, rtol=1e-3)
    assert not torch.allclose(mapped.velocity(R), mapped.velocity(R + 0.1), rtol=1e-4)


@networks
def test_the_head_is_trained_from_the_first_step(mapped: Mapped) -> None:
    mapped.velocity(R).square().sum().backward()
    moved = {n for n, p in mapped.network.get_submodule(HEAD).named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"last.weight", "last.bias"}, "zeros above keep the first layer still for one step"


@networks
def test_gradient_checkpointing_recomputes_what_forward_saw(name: str, tiny_wan: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        mapped = Mapped(name, tiny_wan.parent)
        mapped.train_head()
        if checkpointing:
            mapped.network.enable_gradient_checkpointing()  # type: ignore[operator]
            mapped.network.train()
        mapped.velocity(R).square().sum().backward()
        found.append([p.grad.clone() for p in mapped.network.parameters() if p.grad is not None])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*found, strict=True))


@networks
def test_a_saved_flow_map_comes_back_and_stock_diffusers_loads_the_rest(
    mapped: Mapped, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    mapped.train_head()
    mapped.adapter.folder.save(tmp_path, copy.deepcopy(mapped.network), {"sampler": "flow_map"})
    assert set(load_file(tmp_path / HEAD_FILE)) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    weights = load_file(next((tmp_path / "transformer").glob("*.safetensors")))
    assert not [key for key in weights if HEAD in key], "stock diffusers would warn about keys that it does not know"
    back = mapped.adapter.folder.load_network(str(tmp_path))
    assert torch.equal(mapped.adapter.velocity(back, mapped.x, T, mapped.condition, r=R), mapped.velocity(R))
    assert HEAD in dict(mapped.network.named_children()), "saving leaves the network as it was"
    again = mapped.adapter.folder.load_network()
    mapped.adapter.folder.save(tmp_path / "plain", again, {})
    assert not (tmp_path / "plain" / HEAD_FILE).exists()


@networks
def test_a_network_without_a_head_refuses_r(mapped: Mapped) -> None:
    with pytest.raises(UserError, match="not a flow map"):
        mapped.adapter.velocity(mapped.adapter.folder.load_network(), mapped.x, T, mapped.condition, r=R)


def test_a_head_that_fits_another_network_is_refused(tiny_wan: Path, tmp_path: Path) -> None:
    wan, cog = Mapped("wan", tiny_wan.parent), Mapped("cogvideox", tiny_wan.parent)
    wan.adapter.folder.save(tmp_path / "wan", wan.network, {})
    cog.adapter.folder.save(tmp_path / "cog", cog.network, {})
    (tmp_path / "cog" / HEAD_FILE).rename(tmp_path / "wan" / HEAD_FILE)
    with pytest.raises(UserError, match="does not fit"):
        wan.adapter.folder.load_network(str(tmp_path / "wan"))


def test_given_frames_are_at_rest_and_their_jumps_straight(tiny_wan: Path) -> None:
    mapped = Mapped("wan", tiny_wan.parent)
    mapped.train_head()
    role = RoleHandle("student", mapped.adapter, mapped.network)
    clean, noise = torch.randn_like(mapped.x), torch.randn_like(mapped.x)
    mask = torch.zeros(2, mapped.x.shape[2], dtype=torch.bool)
    mask[:, 0] = True
    condition = mapped.condition | Condition({}, Given(mask, clean))
    x_t, x_r = add_noise(clean, noise, T), add_noise(clean, noise, R)
    with torch.no_grad():
        found = role.flow_map(x_t, T, R, condition)
        direct = mapped.adapter.velocity(
            mapped.network,
            condition.given.fill(x_t),  # type: ignore[union-attr]
            torch.stack([torch.zeros(2), T], dim=1),
            mapped.condition,
            r=torch.stack([torch.zeros(2), R], dim=1),
        )
    torch.testing.assert_close(found[:, :, 0], x_r[:, :, 0])
    torch.testing.assert_close(found[:, :, 1], (x_t - (T - R).view(-1, 1, 1, 1, 1) * direct)[:, :, 1])


def exact(t: Tensor, x: Tensor, r: Tensor) -> Tensor:
    return GaussianMeanVelocity(MEAN, STD).double()(x, t, torch.zeros(len(x)), r)  # type: ignore[no-any-return]


def state(t: Tensor, z: Tensor) -> Tensor:
    """Where the flow of N(MEAN, STD^2) is at ``t`` when it ends in ``MEAN + STD z``."""
    alpha, sigma = (1 - t).view(-1, 1, 1, 1, 1), t.view(-1, 1, 1, 1, 1)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z


def test_the_exact_mean_velocity_is_the_slope_between_two_states_of_one_path() -> None:
    t = torch.tensor([1.0, 0.8, 0.5, 0.5], dtype=torch.float64)
    r = torch.tensor([0.0, 0.3, 0.1, 0.5], dtype=torch.float64)
    z = torch.randn(4, 1, 1, 2, 2, dtype=torch.float64)
    x, found = state(t, z), exact(t, state(t, z), r)
    slope = (x - state(r, z))[:3] / (t - r)[:3].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(found[:3], slope, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], x[0] - MEAN - STD * x[0], rtol=0, atol=1e-6)
    velocity = AnalyticAdapter(AnalyticConfig(means=(MEAN,), stds=(STD,))).folder.load_network().double()
    torch.testing.assert_close(found, exact(t, x, r))
    torch.testing.assert_close(exact(t, x, t), velocity(x, t, torch.zeros(4)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 0.9375, 0.8333, 0.625)])
def test_the_sampler_of_the_exact_flow_map_ends_in_the_same_sample_over_any_times(
    times: tuple[float, ...], adapter: SpyAdapter
) -> None:
    role = RoleHandle("student", adapter, gaussian(adapter, "mean_velocity"))
    noise, condition = torch.randn(50, *adapter.codec.latent_shape), adapter.conditioner.negative(50)

    def velocity(x_t: Tensor, t: Tensor, *, r: Tensor | None = None) -> Tensor:
        return role.velocity(x_t, t, condition, r=r)

    with torch.no_grad():
        torch.testing.assert_close(flow_map(velocity, noise, times), MEAN + STD * noise)
    assert len(adapter.calls) == len(times)
    assert [float(call.r[0]) for call in adapter.calls if call.r is not None] == pytest.approx([*times[1:], 0.0])
    sampled = generate("flow_map", velocity, noise, times, lambda like: torch.full_like(like, torch.nan))
    torch.testing.assert_close(sampled, MEAN + STD * noise)


def test_the_analytic_family_keeps_what_kind_of_network_it_saved(tmp_path: Path) -> None:
    adapter = AnalyticAdapter(AnalyticConfig())
    for kind in ("denoiser", "consistency", "mean_velocity"):
        network = adapter.folder.load_network(kind)
        adapter.folder.save(tmp_path / kind, network, {})
        assert type(adapter.folder.load_network(str(tmp_path / kind))) is type(network)
    with pytest.raises(UserError, match="networks of two times are 'mean_velocity' and 'mlp'"):
        adapter.folder.add_flow_map(adapter.folder.load_network("denoiser"))
    adapter.folder.add_flow_map(adapter.folder.load_network("mean_velocity"))
    mixture = AnalyticAdapter(AnalyticConfig(means=(0.0, 1.0), stds=(1.0, 1.0), weights=(1.0, 1.0)))
    with pytest.raises(UserError, match="'mean_velocity' needs one component"):
        mixture.folder.load_network("mean_velocity")
