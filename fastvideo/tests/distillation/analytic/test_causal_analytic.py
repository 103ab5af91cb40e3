"""Causal SFT, CD and KD on AR(1) frames, where the velocity of a chunk on its past is known, as fixed points are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticConfig
from fastvideo.distillation.adapters.analytic_networks import FrameConsistency, FrameDenoiser, Frames, Seen
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.causal_rollout import forced, forced_velocity
from fastvideo.distillation.chunks import Context, Masked, Reach
from fastvideo.distillation.engine.training import RoleTraining, tensors_of
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.methods.consistency_model.causal_cd import CausalCDConfig, CausalCDMethod
from fastvideo.distillation.methods.fine_tuning.causal_sft import CausalSFTConfig, CausalSFTMethod
from fastvideo.distillation.methods.fine_tuning.sft import SFTConfig, SFTMethod
from fastvideo.distillation.methods.knowledge_distillation.causal_kd import CausalKDConfig, CausalKDMethod, states_at
from fastvideo.distillation.noise import guide, velocity_to_x0
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, RawBatch, UserError
from fastvideo.tests.distillation.toys import SpyAdapter, train
from fastvideo.tests.preparing import preparer

A = 0.9
REST = 1 - A**2
"""Variance of a frame on its clean predecessor; that of the first one is 1."""


class Spy(SpyAdapter):
    """Frames with correlation ``A``, mean 0 and variance 1, that remembers calls and their contexts."""

    def __init__(self, frames: int, pixels: int) -> None:
        super().__init__(AnalyticConfig(means=(0.0,), stds=(1.0,), correlation=A, shape=(1, frames, pixels, pixels)))
        self.contexts: list[Context | None] = []
        self.ensure_negative_conditioning()

    def velocity(self, *arguments: Any, context: Context | None = None, **options: Any) -> Tensor:
        self.contexts.append(context)
        return super().velocity(*arguments, context=context, **options)


def batch_of(adapter: Spy, count: int, seed: int = 5, captions: tuple[str, ...] = ()) -> Batch:
    """Exact videos of the world."""
    noise = torch.randn((count, *adapter.codec.latent_shape), generator=torch.Generator().manual_seed(seed))
    captions = captions or ("",) * count
    return preparer(adapter)(RawBatch(captions, adapter.data_of(noise, adapter.conditioner.encode_prompts(captions))))


def student(adapter: Spy, network: nn.Module) -> RoleHandle:
    return RoleHandle("student", adapter, network, trainable=True)


def sft(adapter: Spy, network: nn.Module | None = None, rank: int = 0, **options: Any) -> CausalSFTMethod:
    bundle = ModelBundle([student(adapter, network or FrameDenoiser(0.0, 1.0, A))])
    config = CausalSFTConfig(caption_dropout=0.0, **options)
    return CausalSFTMethod(config, bundle, Ladder((1.0,)), RandomStreams(3, rank=rank, ranks=2))


def floor(variance: float, t: float) -> float:
    """Loss of the exact velocity of N(mean, variance): the conditional variance of ``noise - x0``."""
    return variance / ((1 - t) ** 2 * variance + t**2)


@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_the_loss_of_the_exact_velocity_is_the_variance_that_its_past_leaves(forcing: str) -> None:
    """At t = .5; a past at .5 says half as much of the next frame as a clean one. A leak would make it 0."""
    adapter, t = Spy(2, 100), 0.5
    seen = 1.0 if forcing == "teacher" else 0.5
    loss = next(sft(adapter, forcing=forcing, time_range=(t, t)).losses(batch_of(adapter, 4), 0))
    first, last = floor(1.0, t), floor(1 - A**2 * seen, t)
    assert float(loss.metrics["first_chunk"]) == pytest.approx(first, rel=0.02)
    assert float(loss.metrics["last_chunk"]) == pytest.approx(last, rel=0.02)
    assert float(loss.value.detach()) == pytest.approx((first + last) / 2, rel=0.02)


def test_the_first_chunk_of_the_metrics_has_the_remainder_too() -> None:
    """Seven frames are chunks of four and of three."""
    loss = next(sft(Spy(7, 4), reach=Reach(3)).losses(batch_of(Spy(7, 4), 4), 0))
    first, last = (float(loss.metrics[name]) for name in ("first_chunk", "last_chunk"))
    assert float(loss.value.detach()) == pytest.approx((4 * first + 3 * last) / 7)


def test_every_chunk_has_a_time_of_its_own() -> None:
    """Five frames in chunks of two: the first chunk has three."""
    adapter = Spy(5, 2)
    next(sft(adapter, reach={"chunk": 2}, time_density="uniform", time_shift=1.0).losses(batch_of(adapter, 400), 0))
    (t,) = (call.t for call in adapter.calls)
    assert torch.equal(t[:, :3], t[:, :1].expand(-1, 3))
    assert torch.equal(t[:, 3:], t[:, 3:4].expand(-1, 2))
    assert abs(float(torch.corrcoef(torch.stack([t[:, 0], t[:, 3]]))[0, 1])) < 0.15
    assert float(t.mean()) == pytest.approx(0.5, abs=0.05)


def test_a_bidirectional_step_is_one_of_sft() -> None:
    adapter = Spy(3, 4)
    batch = batch_of(adapter, 4)
    bundle = ModelBundle([student(adapter, FrameDenoiser(0.0, 1.0, A))])
    plain = SFTMethod(SFTConfig(caption_dropout=0.0, time_shift=5.0), bundle, Ladder((1.0,)), RandomStreams(3))
    mixed = sft(adapter, bidirectional_share=1.0)
    assert torch.equal(*(next(method.losses(batch, 0)).value for method in (mixed, plain)))
    assert adapter.contexts == [None, None]


def test_the_share_of_bidirectional_steps_is_drawn_alike_on_all_ranks() -> None:
    adapter = Spy(2, 1)
    batch, found = batch_of(adapter, 1), []
    for rank in (0, 1):
        adapter.contexts.clear()
        method = sft(adapter, rank=rank, bidirectional_share=0.3)
        for step in range(100):
            next(method.losses(batch, step))
        found.append([context is None for context in adapter.contexts])
    assert found[0] == found[1]
    assert sum(found[0]) == pytest.approx(30, abs=15)


def test_noise_on_the_past_is_drawn_up_to_its_bound_and_told() -> None:
    """What is left of the noise after the clean part is taken away has deviation 1 at the time that is told."""
    x0, rng, reach = (
        torch.randn(2, 3, 4, 30, 30, generator=torch.Generator().manual_seed(1)),
        RandomStreams(3),
        Reach(2),
    )
    assert forced(reach, x0, 0.0, rng) == Masked(reach, x0)
    pasts = [forced(reach, x0, 0.4, rng) for _ in range(40)]
    assert 0.3 < max(past.clean_time for past in pasts) < 0.4
    assert 0.0 < min(past.clean_time for past in pasts) < 0.1
    assert pasts[0].clean is not None
    time = pasts[0].clean_time
    assert float(((pasts[0].clean - (1 - time) * x0) / time).std()) == pytest.approx(1.0, rel=0.03)
    twice = [forced(reach, x0, 0.4, RandomStreams(3, rank=rank, ranks=2)).clean_time for rank in (0, 1)]
    assert twice[0] == twice[1]


def test_a_student_learns_how_far_its_past_decides(generator: torch.Generator) -> None:
    """The correlation as a parameter, from a wrong start: teacher forcing finds the world's."""

    class Learned(FrameDenoiser):
        def __init__(self, start: float) -> None:
            super().__init__(0.0, 1.0, start)
            del self.correlation
            self.correlation = nn.Parameter(torch.tensor(start))

    adapter, network = Spy(2, 20), Learned(0.5)
    method = sft(adapter, network, time_density="uniform", time_shift=1.0, time_range=(0.05, 0.95))

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return batch_of(adapter, 4, seed=step)

    train(method, batches, 80, {"student": 0.03})
    assert float(network.correlation.detach()) == pytest.approx(A, abs=0.03)


def cd(adapter: Spy, network: nn.Module | None = None, **options: Any) -> CausalCDMethod:
    """Causal CD of the given student, or of the exact one, with the exact teacher."""
    teacher = RoleHandle("teacher", adapter, FrameDenoiser(0.0, 1.0, A))
    handles = [student(adapter, network or FrameConsistency(0.0, 1.0, A)), teacher]
    config = CausalCDConfig(**{"teacher_guidance": 1.0, "grid_shift": 1.0, **options})
    return CausalCDMethod(config, ModelBundle(handles), Ladder((1.0, 0.5)), RandomStreams(3))


def test_the_exact_student_is_left_with_the_error_of_an_euler_step() -> None:
    """Of second order, so the loss falls by 16 when the grid is twice as fine."""
    adapter, losses = Spy(3, 60), []
    for steps in (50, 100):
        method, batch = cd(adapter, grid_steps=steps), batch_of(adapter, 16)
        losses.append(float(next(method.losses(batch, 0)).value.detach()))
    assert losses[0] < 1e-6
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.5)


def test_a_step_is_a_call_of_the_average_and_one_with_gradient_on_the_same_clean_past() -> None:
    adapter = Spy(3, 2)
    method, batch = cd(adapter, teacher_guidance=2.0, reach={"chunk": 2}), batch_of(adapter, 4)
    next(method.losses(batch, 0))
    assert [adapter.grad_modes(method.bundle[role]) for role in ("teacher", "student")] == ["nn", "ng"]
    assert all(isinstance(past, Masked) and past.clean is batch.x0 for past in adapter.contexts)
    teacher, target, estimate = adapter.calls[0].t, adapter.calls[2].t, adapter.calls[3].t
    assert torch.equal(teacher, estimate)
    assert torch.equal(method.grid[(method.grid == teacher[..., None]).int().argmax(-1) + 1], target)
    assert torch.equal(teacher[:, 0], teacher[:, 2]), "the first chunk has all three frames"


def test_the_last_interval_ends_at_the_data_of_the_flow() -> None:
    """A grid of one time: t = 1 and r = 0, where the target is the teacher's step itself, guided by hand here."""
    adapter = Spy(2, 3)
    network = FrameConsistency(0.3, 0.8, A)
    method = cd(adapter, network, grid_steps=1, teacher_guidance=3.0)
    batch = batch_of(adapter, 3, captions=("1", "0.5", "-1"))
    loss = next(method.losses(batch, 0))
    noise, past = adapter.calls[0].x_t, Masked(Reach(), batch.latents)
    assert torch.equal(adapter.calls[0].t, torch.ones(3, 2))
    ones, teacher = torch.ones(3, 2), method.teacher
    u = guide(*(teacher.velocity(noise, ones, c, context=past) for c in (batch.negative, batch.condition)), 3.0)
    estimate = velocity_to_x0(noise, method.student.velocity(noise, ones, batch.condition, context=past), ones)
    expected = 0.5 * (estimate - (noise - u)).square().mean()
    torch.testing.assert_close(loss.value, expected)


def test_the_target_is_the_average_and_the_live_weights_stay() -> None:
    """The exact student as its average shows the error of the live one, whose own estimates agree."""
    adapter = Spy(2, 8)
    method, batch = cd(adapter, FrameConsistency(0.5, 1.0, A), grid_steps=200), batch_of(adapter, 8)
    handle = method.student
    own = float(next(method.losses(batch, 0)).value.detach())
    live = {name: value.clone() for name, value in tensors_of(handle).items()}
    optimizer = torch.optim.Adam(handle.parameters())
    handle.training = RoleTraining(optimizer, None, {**live, "mean": torch.tensor(0.0)})
    averaged = next(method.losses(batch, 0))
    averaged.value.backward()  # type: ignore[no-untyped-call]
    assert own < 1e-4, "neighbouring estimates of one student agree, whatever it believes"
    assert float(averaged.value.detach()) > 1e-3
    assert all(torch.equal(value, live[name]) for name, value in tensors_of(handle).items())
    assert handle.training.ema is not None
    assert float(handle.training.ema["mean"]) == 0.0


@pytest.mark.nightly
def test_causal_cd_brings_a_student_to_the_world() -> None:
    adapter, network = Spy(3, 20), FrameConsistency(0.4, 0.6, A)
    method = cd(adapter, network, grid_steps=100)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        adapter.contexts.clear()
        return batch_of(adapter, 8, seed=step)

    train(method, batches, 1500, {"student": 0.01})
    assert (float(network.mean.detach()), float(network.std.detach())) == pytest.approx((0.0, 1.0), abs=0.03)


class Linear(Frames):
    """One step from noise, ``own noise + seen (the frame before)``, for the first frame ``first noise``."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, A)
        self.first, self.own, self.seen = (nn.Parameter(torch.tensor(value)) for value in (0.5, 0.5, 0.0))

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor, seen: Seen | None = None) -> Tensor:
        """Velocity of a chunk of one frame at t = 1."""
        end = self.first * x_t if seen is None else self.own * x_t + self.seen * seen.latents[:, :, -1:]
        return x_t - end


def kd(adapter: Spy, network: nn.Module | None = None, ladder: Ladder | None = None, **options: Any) -> CausalKDMethod:
    bundle = ModelBundle([student(adapter, network or FrameConsistency(0.0, 1.0, A))])
    return CausalKDMethod(CausalKDConfig(**options), bundle, ladder or Ladder((1.0,)), RandomStreams(3))


def pairs(adapter: Spy, count: int, seed: int, causal: bool) -> Batch:
    """Noise and ends in closed form: each frame on the data before it, or ``Sigma^(1/2) noise`` of both frames."""
    batch = batch_of(adapter, count, seed)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(seed + 10_000))
    if not causal:
        ends = adapter.data_of(noise, batch.condition)
        walk = Trajectory(noise[:, None], torch.ones(count, 1))
        return Batch(batch.shape, batch.condition, batch.negative, ends, walk)
    ends = torch.cat([noise[:, :, :1], A * batch.latents[:, :, :1] + math.sqrt(REST) * noise[:, :, 1:]], dim=2)
    walk = Trajectory(torch.stack([noise, ends], dim=1), torch.tensor([[1.0, 0.0]]).expand(count, -1))
    return Batch(batch.shape, batch.condition, batch.negative, batch.latents, walk)


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_an_autoregressive_teacher_are_a_function_of_the_past_and_others_are_not(causal: bool) -> None:
    """With ``Sigma^(1/2) = [[p, q], [q, p]]``, p = .8473 and q = .5311: the first frame of a bidirectional pair is
    ``p e_0 + q e_1``, so the student learns p and an error of q^2 = .2821 stays; the second one is ``(q / p) x_0 +
    sqrt(det) / p e_1``, which streams with a variance of .66."""
    adapter, network = Spy(2, 12), Linear()
    method = kd(adapter, network, allow_bidirectional_pairs=not causal)

    def batches(step: int) -> Batch:
        adapter.calls.clear()
        return pairs(adapter, 32, step, causal)

    train(method, batches, 150, {"student": 0.05})
    root = (math.sqrt(1 + A), math.sqrt(1 - A))
    p, q = sum(root) / 2, (root[0] - root[1]) / 2
    assert (p, q**2) == pytest.approx((0.8473, 0.2821), abs=1e-4)
    found = [float(value.detach()) for value in (network.first, network.seen, network.own)]
    expected = [1.0, A, math.sqrt(REST)] if causal else [p, q / p, math.sqrt(REST) / p]
    assert found == pytest.approx(expected, abs=0.02)
    loss = float(next(method.losses(pairs(adapter, 64, 999, causal), 0)).value.detach())
    assert loss == pytest.approx(0.0 if causal else 0.5 * q**2 / 2, abs=0.005)


def test_each_chunk_starts_from_a_state_of_its_own_at_that_states_time() -> None:
    """The number of the state is written into it; under diffusion forcing the clean end is one of them."""
    ladder = Ladder((1.0, 0.75, 0.5))
    adapter = Spy(5, 2)
    batch = batch_of(adapter, 300)
    numbers = torch.arange(4.0).view(1, 4, 1, 1, 1, 1).expand(300, 4, *adapter.codec.latent_shape)
    walk = Trajectory(numbers, torch.tensor(ladder.with_end).expand(300, -1))
    stored = Batch(batch.shape, batch.condition, batch.negative, batch.latents, walk)
    for forcing, steps in (("teacher", 3), ("diffusion", 4)):
        adapter.calls.clear()
        next(kd(adapter, FrameDenoiser(0.0, 1.0, A), ladder, forcing=forcing, reach={"chunk": 2}).losses(stored, 0))
        seen = adapter.calls[0].x_t[:, 0, :, 0, 0].long()
        assert torch.equal(adapter.calls[0].t, torch.tensor(ladder.with_end)[seen])
        assert torch.equal(seen[:, :3], seen[:, :1].expand(-1, 3))
        assert torch.equal(seen[:, 3], seen[:, 4])
        counts = torch.bincount(seen[:, [0, 3]].flatten(), minlength=4)
        assert counts.tolist() == pytest.approx([600 / steps] * steps + [0] * (4 - steps), abs=60)
        assert (seen[:, 0] != seen[:, 3]).float().mean() > 0.5


def test_clean_chunks_have_no_loss_and_the_others_are_averaged_alone() -> None:
    ladder, adapter = Ladder((1.0, 0.5)), Spy(4, 2)
    batch = batch_of(adapter, 6)
    states = torch.randn(6, 3, *adapter.codec.latent_shape, generator=torch.Generator().manual_seed(2))
    walk = Trajectory(states, torch.tensor(ladder.with_end).expand(6, -1))
    stored = Batch(batch.shape, batch.condition, batch.negative, batch.latents, walk)
    loss = next(kd(adapter, FrameDenoiser(0.2, 1.0, A), ladder, forcing="diffusion").losses(stored, 0))
    loss.value.backward()  # type: ignore[no-untyped-call]
    call = adapter.calls[0]
    noisy = call.t > 0
    assert 0 < int(noisy.sum()) < noisy.numel()
    error = velocity_to_x0(call.x_t, call.output, call.t) - states[:, 2]
    frames = error.detach().square().mean(dim=(1, 3, 4))
    assert float(loss.value.detach()) == pytest.approx(float(0.5 * frames[noisy].mean()), rel=1e-5)
    gradient = call.output.grad
    assert gradient is not None
    assert (gradient.abs().amax(dim=(1, 3, 4)) > 0).equal(noisy)


def test_states_are_gathered_frame_by_frame() -> None:
    walk = torch.arange(24.0).view(1, 3, 2, 4, 1, 1)
    found = states_at(walk, torch.tensor([[2, 0, 1, 2]]))
    assert found[0, :, :, 0, 0].tolist() == [[16.0, 1.0, 10.0, 19.0], [20.0, 5.0, 14.0, 23.0]]


@pytest.mark.parametrize(("times", "allowed"), [((1.0, 0.5), False), ((1.0, 0.6, 0.0), False), ((1.0, 0.6), True)])
def test_states_of_another_kind_or_ladder_are_refused(times: tuple[float, ...], allowed: bool) -> None:
    adapter, ladder = Spy(2, 2), Ladder((1.0, 0.5))
    batch = batch_of(adapter, 2)
    walk = Trajectory(batch.latents[:, None].expand(-1, len(times), -1, -1, -1, -1), torch.tensor(times).expand(2, -1))
    stored = Batch(batch.shape, batch.condition, batch.negative, batch.latents, walk)
    with pytest.raises(UserError, match="stored states are at times"):
        next(kd(adapter, None, ladder, allow_bidirectional_pairs=allowed).losses(stored, 0))


def test_a_forced_walk_ends_where_the_past_and_the_noise_say() -> None:
    """Euler steps of the exact teacher, all chunks at once: ``a x_{k-1} + sqrt(1 - a^2) noise`` on data."""
    adapter = Spy(4, 3)
    batch, teacher = batch_of(adapter, 2, captions=("0.5", "-1")), RoleHandle("t", adapter, FrameDenoiser(0.0, 1.0, A))
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(3))
    velocity = forced_velocity(teacher, Masked(Reach(), batch.latents), batch.condition, batch.negative, 1.0)
    end = euler(velocity, noise, uniform_ladder(150).times)
    mean = torch.tensor([0.5, -1.0]).view(-1, 1, 1, 1, 1)
    before = batch.latents[:, :, :-1] - mean
    expected = torch.cat([noise[:, :, :1], A * before + math.sqrt(REST) * noise[:, :, 1:]], dim=2) + mean
    torch.testing.assert_close(end, expected, rtol=0, atol=0.06)
