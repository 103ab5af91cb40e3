"""Self-Forcing and CausVid on AR(1) frames: which calls run, what the gradient passes, and where it vanishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import FrameConsistency, FrameDenoiser, SiteMLP
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.chunks import Masked, Past, Reach
from fastvideo.distillation.methods.distribution_matching.causvid import CausVidConfig, CausVidMethod
from fastvideo.distillation.methods.distribution_matching.self_forcing import SelfForcingConfig, SelfForcingMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Condition, Given, UserError
from fastvideo.tests.distillation.toys import LADDER, SpyAdapter, analytic_batch

A = 0.9
K = len(LADDER)


def spy_of(frames: int = 3, pixels: int = 4) -> SpyAdapter:
    """Frames with correlation ``A``, mean 0 and variance 1."""
    adapter = SpyAdapter(AnalyticConfig(means=(0.0,), stds=(1.0,), correlation=A, shape=(1, frames, pixels, pixels)))
    adapter.ensure_negative_conditioning()
    return adapter


def bundle_of(adapter: SpyAdapter, student: nn.Module | None = None, critic: nn.Module | None = None) -> ModelBundle:
    networks = {
        "student": student or FrameConsistency(0.0, 1.0, A),
        "teacher": FrameDenoiser(0.0, 1.0, A),
        "critic": critic or FrameDenoiser(0.0, 1.0, A),
    }
    return ModelBundle([RoleHandle(name, adapter, network, name != "teacher") for name, network in networks.items()])


def self_forcing(
    adapter: SpyAdapter, *, ladder: Ladder = LADDER, rng: RandomStreams | None = None, **options: Any
) -> SelfForcingMethod:
    """The method at the exact student, unless ``student`` or ``critic`` are given."""
    bundle = bundle_of(adapter, options.pop("student", None), options.pop("critic", None))
    config = SelfForcingConfig(**{"teacher_guidance": 1.0, "generator_update_interval": 2, **options})
    return SelfForcingMethod(config, bundle, ladder, rng or RandomStreams(3))


def prompts(adapter: SpyAdapter, count: int = 2) -> Batch:
    return analytic_batch(adapter, count, latents=False)


class Exit(RandomStreams):
    """Streams whose shared decision is fixed."""

    def __init__(self, index: int) -> None:
        super().__init__(3)
        self.fixed = index

    def shared_index(self, high: int) -> int:
        return min(self.fixed, high - 1)


@pytest.mark.parametrize("stop", range(K))
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_student_step_evaluates_as_accounted(stop: int, chunk: int) -> None:
    """``n (e + 2) - 1`` calls of the student: the last chunk is never committed."""
    adapter = spy_of(5)
    method, chunks = self_forcing(adapter, rng=Exit(stop), reach=Reach(chunk), teacher_guidance=2.0), 5 // chunk
    list(method.losses(prompts(adapter), 0))
    assert adapter.grad_modes(method.student) == ("n" * stop + "g") * chunks
    assert len(adapter.of(method.student)) + len(adapter.commits) == chunks * (stop + 2) - 1
    assert adapter.grad_modes(method.teacher) == "nn"
    assert adapter.grad_modes(method.critic) == "ng"
    adapter.calls.clear()
    list(method.losses(prompts(adapter), 1))
    assert adapter.grad_modes(method.student) == "n" * (stop + 1) * chunks
    assert adapter.grad_modes(method.critic) == "g"


@pytest.mark.parametrize("context_time", [0.0, 0.1])
def test_clean_samples_are_committed_once_and_at_the_context_time(context_time: float) -> None:
    adapter = spy_of(4)
    method = self_forcing(adapter, rng=Exit(2), context_time=context_time)
    x0 = method.rollout(prompts(adapter))
    assert [commit.t for commit in adapter.commits] == [context_time] * 3
    for index, commit in enumerate(adapter.commits):
        assert commit.past.length == index
        sample = x0[:, :, index : index + 1].detach()
        assert torch.equal(commit.x0, sample) == (context_time == 0)
        assert float((commit.x0 - (1 - context_time) * sample).std()) == pytest.approx(context_time, abs=0.05)
    seen = [call.context for call in adapter.of(method.student)]
    assert [past.length for past in seen if isinstance(past, Past)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_no_gradient_flows_through_the_past() -> None:
    """``x_2 = m + a (x_1 - m) + noise``: its derivative by ``m`` is ``1 - a`` and not 1, as along the chain."""
    adapter = spy_of(2)
    method = self_forcing(adapter, ladder=Ladder((1.0,)))
    x0 = method.rollout(prompts(adapter))
    mean = method.student.network.mean
    for frame, expected in ((0, 1.0), (1, 1 - A)):
        (found,) = torch.autograd.grad(x0[:, :, frame].mean(), mean, retain_graph=True)
        assert float(found) == pytest.approx(expected, abs=1e-5)


def covariance(x0: Tensor) -> Tensor:
    return x0.detach().movedim(2, -1).reshape(-1, x0.shape[2]).T.cov()


def truth(frames: int) -> Tensor:
    return FrameDenoiser(0.0, 1.0, A).correlations(range(frames))


@pytest.mark.parametrize("options", [{}, {"same_exit": False}, {"last_exit_only": True}], ids=str)
def test_rollouts_of_the_exact_student_have_the_covariance_of_the_world(options: dict[str, bool]) -> None:
    adapter = spy_of(3, 250)
    method = self_forcing(adapter, **options)
    with torch.no_grad():
        x0 = method.rollout(prompts(adapter, 4))
    torch.testing.assert_close(covariance(x0), truth(3), rtol=0, atol=0.015)


class Learned(FrameDenoiser):
    """The best critic for Gaussian samples of this covariance."""

    def __init__(self, found: Tensor) -> None:
        super().__init__(0.0, 1.0, A)
        self.found = found

    def correlations(self, positions: Sequence[int]) -> Tensor:
        return self.found[list(positions)][:, list(positions)]


def gradients(method: Any, batch: Batch) -> tuple[float, dict[str, float]]:
    """RMS of the DMD gradient with the best critic for the student's samples, and its parameters' gradients."""
    with torch.no_grad():
        method.critic.network.found = covariance(torch.cat([method.rollout(batch) for _ in range(4)]))
    x0, scored = method.sample(batch)
    loss = method.student_loss(x0, scored)
    loss.value.backward()
    found = {name: float(p.grad) for name, p in method.student.network.named_parameters()}
    return float(loss.metrics["dmd_gradient_rms"]), found


def exact_batch(adapter: SpyAdapter, count: int) -> Batch:
    """Data of the world."""
    batch = prompts(adapter, count)
    noise = torch.randn((count, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(9))
    return replace(batch, x0=adapter.data_of(noise, batch.condition))


class Levels(RandomStreams):
    """Streams that leave every chunk before the last one clean."""

    def index(self, count: int, high: int) -> Tensor:
        drawn = super().index(count, high - 1).view(-1, 3)
        drawn[:, :2] = high - 1
        return drawn.flatten()


def causvid(adapter: SpyAdapter, rng: RandomStreams, **options: Any) -> CausVidMethod:
    config = CausVidConfig(**{"teacher_guidance": 1.0, "generator_update_interval": 2, **options})
    return CausVidMethod(config, bundle_of(adapter, critic=Learned(truth(adapter.codec.latent_shape[1]))), LADDER, rng)


def test_the_gradient_vanishes_at_the_exact_student_on_its_own_past_and_on_a_clean_one_alone() -> None:
    """On noisy chunks, as CausVid trains, the exact student is not stationary: that is its exposure bias."""
    adapter = spy_of(3, 120)
    batch, found = exact_batch(adapter, 4), {}
    found["self_forcing"] = gradients(self_forcing(adapter, critic=Learned(truth(3))), batch)
    found["clean"] = gradients(causvid(adapter, Levels(3)), batch)
    found["noisy"] = gradients(causvid(adapter, RandomStreams(3)), batch)
    for name in ("self_forcing", "clean"):
        assert found[name][0] < 0.03, found
        assert max(map(abs, found[name][1].values())) < 0.004, found
    assert found["noisy"][0] > 0.15, found
    assert abs(found["noisy"][1]["log_std"]) > 0.02, found


def test_causvid_notes_a_level_per_chunk_and_a_clean_one_is_the_data() -> None:
    adapter = spy_of(7, 2)
    method = causvid(adapter, RandomStreams(3), reach=Reach(3))
    batch = exact_batch(adapter, 400)
    x0 = method.rollout(batch)
    (call,) = adapter.calls
    assert call.context == Masked(Reach(3))
    assert torch.equal(call.t[:, 0], call.t[:, 3])
    levels = torch.stack([call.t[:, 0], call.t[:, 4]], dim=1)
    for level in LADDER.with_end:
        assert ((levels - level).abs() < 1e-6).float().mean(0).tolist() == pytest.approx([0.2, 0.2], abs=0.08)
    both = (levels == 0).all(1).float().mean()
    assert float(both) == pytest.approx(0.04, abs=0.03), "chunks draw independently"
    clean = call.t == 0
    assert torch.equal(x0.detach()[:, 0][clean], batch.latents[:, 0][clean])
    list(method.losses(batch, 0))
    assert all(call.t.ndim == 1 for call in adapter.of(method.teacher) + adapter.of(method.critic))


def test_exits_are_uniform_and_equal_on_all_ranks() -> None:
    adapter = spy_of(2)
    drawn = {}
    for rank in (0, 3):
        method = self_forcing(adapter, rng=RandomStreams(3, rank=rank), same_exit=False)
        drawn[rank] = [tuple(map(len, method.exits(2))) for _ in range(800)]
    assert drawn[0] == drawn[3]
    counts = Counter(drawn[0])
    assert len(counts) == K * K
    assert max(abs(count - 50) for count in counts.values()) < 30
    same = self_forcing(adapter)
    assert {tuple(map(len, same.exits(3))) for _ in range(200)} == {(k, k, k) for k in range(1, K + 1)}


def test_a_critic_that_is_told_hears_where_all_chunks_left_the_ladder() -> None:
    seen = set()
    for step in range(12):
        adapter = spy_of()
        method = self_forcing(adapter, rng=RandomStreams(step), critic=SiteMLP(1), critic_sees_rung=True)
        list(method.losses(prompts(adapter), step % 2))
        last, (*_, call) = adapter.of(method.student)[-1].t[0], adapter.of(method.critic)
        assert call.r is not None
        torch.testing.assert_close(call.t - call.r, torch.full((2,), float(last) - LADDER.times[-1]))
        seen.add(round(float(last), 3))
    assert len(seen) == K


def test_the_first_chunk_may_have_a_ladder_of_its_own() -> None:
    adapter = spy_of(3)
    method = self_forcing(adapter, ladder=Ladder((1.0,)), first_ladder=(1.0, 0.6, 0.3), last_exit_only=True)
    method.rollout(prompts(adapter))
    assert [round(float(call.t[0]), 3) for call in adapter.calls] == [1.0, 0.6, 0.3, 1.0, 1.0]
    drawn = {
        tuple(
            map(
                len,
                self_forcing(adapter, ladder=Ladder((1.0,)), first_ladder=(1.0, 0.5), rng=RandomStreams(s)).exits(2),
            )
        )
        for s in range(20)
    }
    assert drawn == {(1, 1), (2, 1)}


@pytest.mark.parametrize("first_frame", ["keep", "mask", "reencode"])
def test_the_last_frames_of_a_long_rollout_are_scored(first_frame: str) -> None:
    """Earlier chunks run without gradient, and the first scored frame is left out as its option says."""
    adapter = spy_of(4)
    method = self_forcing(
        adapter, rng=Exit(1), max_frames=10, first_frame=first_frame, critic=FrameDenoiser(0.3, 1.2, A)
    )
    x0, scored = method.sample(prompts(adapter))
    assert adapter.grad_modes(method.student) == "nn" * 6 + "ng" * 4
    assert tuple(x0.shape) == scored.shape == (2, 1, 4, 4, 4)
    assert scored.unscored == (0 if first_frame == "keep" else 1)
    (gradient,) = torch.autograd.grad(method.student_loss(x0, scored).value, x0)
    carried = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
    assert carried.tolist() == [first_frame == "keep", True, True, True]


def test_left_out_frames_have_no_share_in_loss_and_normaliser() -> None:
    adapter = spy_of(4)
    method = self_forcing(adapter, rng=Exit(1), max_frames=10, critic=FrameDenoiser(0.3, 1.2, A))
    x0, scored = method.sample(prompts(adapter))
    real, fake = torch.zeros_like(x0), torch.ones_like(x0)
    expected = 1 / x0[:, :, 1:].abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    found = method.gradient(x0, real, fake, scored)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=0)
    x0 = x0.detach()
    far = torch.cat([100 * x0[:, :, :1], x0[:, :, 1:]], dim=2)
    assert float(scored.mean(far)) == pytest.approx(float(x0[:, :, 1:].mean()), abs=1e-6)


def test_lengths_are_drawn_in_chunks_equal_on_all_ranks() -> None:
    adapter = spy_of(4)
    options = {"reach": Reach(2), "min_frames": 5, "max_frames": 11}
    drawn = []
    for rank in (0, 1):
        method = self_forcing(adapter, rng=RandomStreams(3, rank=rank), **options)
        drawn.append([method.length(prompts(adapter)) for _ in range(60)])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {5, 7, 9, 11}


def test_losses_of_chunks_are_logged() -> None:
    adapter = spy_of(5)
    method = self_forcing(adapter, reach=Reach(2), critic=FrameDenoiser(0.3, 1.2, A))
    student, critic = method.losses(prompts(adapter), 0)
    assert set(student.metrics) == {"dmd_gradient_rms", "dmd_gradient_rms/chunk-1", "dmd_gradient_rms/chunk-2"}
    assert set(critic.metrics) == {"loss/chunk-1", "loss/chunk-2"}
    parts = [float(critic.metrics[f"loss/chunk-{i}"]) for i in (1, 2)]
    assert float(critic.value.detach()) == pytest.approx((3 * parts[0] + 2 * parts[1]) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_frames": 4}, "min_frames"),
        ({"min_frames": 6, "max_frames": 5}, "min_frames"),
        ({"min_frames": 4, "max_frames": 7, "reach": Reach(2)}, "less a multiple of chunk 2"),
        ({"max_frames": 2, "reach": Reach(3)}, "at least a chunk of 3"),
        ({"max_frames": 4, "scored_frames": 5}, "scored_frames: at most max_frames 4"),
        ({"first_ladder": (0.9, 0.5)}, "first_ladder\n.*starts from pure noise"),
        ({"first_ladder": (1.0, 0.5, 0.7)}, "first_ladder\n.*rises from 0.5 to 0.7"),
        ({"rollout": "data"}, "rollout"),
        ({"critic_sees_rung": True, "same_exit": False}, "critic_sees_rung needs samples of one step"),
        ({"critic_sees_rung": True, "last_exit_only": True}, "critic_sees_rung needs samples of one step"),
        ({"critic_sees_rung": True, "first_ladder": (1.0, 0.5)}, "critic_sees_rung needs samples of one step"),
    ],
)
def test_lengths_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfForcingConfig(**options)


@pytest.mark.parametrize(
    ("options", "frames", "message"),
    [
        ({"scored_frames": 4}, 3, r"method.scored_frames: the model's videos have 3 latent frames .* got 4"),
        ({"reach": Reach(4)}, 3, "method.reach.chunk: a video of 3 latent frames has no chunk of 4"),
        ({"max_frames": 2}, 1, "method.first_frame: reencode leaves the first of 1"),
        ({"scored_frames": 3, "max_frames": 6}, 3, ""),
        ({"max_frames": 2, "first_frame": "keep"}, 1, ""),
    ],
)
def test_what_the_models_videos_do_not_allow(options: dict[str, Any], frames: int, message: str) -> None:
    config = SelfForcingConfig(**options)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        config.check_frames(frames)


def test_given_frames_begin_a_rollout_of_any_length() -> None:
    adapter = spy_of(3)
    batch = exact_batch(adapter, 2)
    mask = torch.tensor([[True, True, False]]).expand(2, -1)
    given = Condition({}, Given(mask, batch.latents))
    batch = replace(batch, condition=batch.condition | given, negative=batch.negative | given)
    method = self_forcing(adapter, max_frames=6)
    x0 = method.rollout(batch)
    torch.testing.assert_close(x0[:, :, :2], batch.latents[:, :, :2])
    assert x0.shape[2] == 6
    assert not torch.allclose(x0[:, :, 2], batch.latents[:, :, 2])
