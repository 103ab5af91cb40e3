"""DMD2 with a frame teacher against closed forms: linear codecs, Gaussians, exact critics.

Student latents ``z = m + tau e``, pixels ``A_s z``, stills of the frame teacher ``M z`` with ``M = pinv(A_t) A_s``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, variance_preserving
from fastvideo.distillation.bridge import LatentBridge
from fastvideo.distillation.bundle import Bridge, ModelBundle, RoleHandle
from fastvideo.distillation.frame_bridge import CodecFrames, FrameBridge, Picks
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.dmd2_frames import DMD2FramesConfig, DMD2FramesMethod
from fastvideo.distillation.methods.distribution_matching.frame_term import FrameTerm, Seen
from fastvideo.distillation.noise import expand_time
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Condition, UserError
from fastvideo.tests.distillation.analytic.test_bridge_analytic import (
    MEAN,
    STUDENT_PIXELS,
    TARGET,
    TAU,
    TEACHER_PIXELS,
    Correlated,
    Generator,
    M,
    S,
    T,
    double,
    family,
)
from fastvideo.tests.distillation.toys import SpyAdapter, analytic_batch, toy_method

OPTIONS: dict[str, Any] = {
    "teacher_guidance": 1.0,
    "frame_guidance": 1.0,
    "generator_update_interval": 1,
    "frame_warmup_steps": 0,
    "trust_frame_teacher": True,
}


class Exact(DMD2FramesMethod):
    """The method at one time and without DMD's normaliser, so that gradients have a closed form."""

    def score_times(self, count: int) -> Tensor:
        return torch.full((count,), T, dtype=torch.float64)

    def gradient(self, x0: Tensor, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        return fake - real


class ExactTerm(FrameTerm):
    """The frame term likewise."""

    def times(self, seen: Seen, bounds: tuple[float, float]) -> Tensor:
        return torch.full((seen.videos * seen.count,), T, dtype=torch.float64)

    def gradient(self, x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real


def with_class(kind: type[FrameTerm], term: FrameTerm) -> FrameTerm:
    return kind(term.config, term.bridge, term.teacher, term.critic, term.rng)


def still_family() -> AnalyticAdapter:
    return family(3, TEACHER_PIXELS)


def video_family(frames: int) -> AnalyticAdapter:
    adapter = AnalyticAdapter(AnalyticConfig(shape=(2, frames, 1, 1), pixels=STUDENT_PIXELS))
    adapter.ensure_negative_conditioning()
    return adapter


class OverFrames(nn.Module):
    """A network of one frame, on each frame of a video."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        frames = [self.network(frame, t, shift) for frame in x_t.split(1, dim=2)]
        return torch.cat(frames, dim=2)


class World:
    """Student, video and frame teacher with exact critics; families, codecs, bridge and method are the real ones."""

    def __init__(
        self, frames: int = 1, covariance: Tensor = S, own_target: tuple[float, float] = (0.8, 0.6), **options: Any
    ) -> None:
        own, video, still = TAU**2 * torch.eye(2, dtype=torch.float64), video_family(frames), still_family()
        self.generator = Generator(double(MEAN), TAU)
        self.critic, self.teacher = Correlated(double(MEAN), own), Correlated(double(own_target), own)
        self.frame_critic, self.frame_teacher = Correlated(M @ double(MEAN), S), Correlated(double(TARGET), covariance)
        handles = [
            RoleHandle("student", video, self.generator, trainable=True),
            RoleHandle("teacher", video, OverFrames(self.teacher)),
            RoleHandle("critic", video, OverFrames(self.critic), trainable=True),
            RoleHandle("frame_teacher", still, self.frame_teacher),
            RoleHandle("frame_critic", still, self.frame_critic, trainable=True),
        ]
        bridges: dict[tuple[str, str], Bridge] = {
            ("student", role): CodecFrames(video.codec, still.codec) for role in ("frame_teacher", "frame_critic")
        }
        config = DMD2FramesConfig(**{**OPTIONS, "frames_per_video": 1, **options})
        self.method = Exact(config, ModelBundle(handles, bridges), Ladder((1.0,)), RandomStreams(5))
        self.method.term = self.term = with_class(ExactTerm, self.method.term)

    def frame_gradient(self, z: Tensor) -> Tensor:
        """Gradient of the frame term at ``z`` ``[B, 2, F]``, times the number of elements that it averages."""
        leaf = z[..., None, None].detach().clone().requires_grad_()
        seen = self.term.frames(leaf, batch_of(len(z), z.shape[2]), gradient=True)
        (found,) = torch.autograd.grad(self.term.loss(seen), leaf)
        return found[..., 0, 0] * seen.stills.latents.numel()


def batch_of(count: int, frames: int = 1) -> Batch:
    condition = Condition({"analytic": {"shift": torch.zeros(count, dtype=torch.float64)}})
    return Batch((count, 2, frames, 1, 1), condition, condition)


def samples(count: int, frames: int = 1) -> tuple[Tensor, Tensor]:
    noise = torch.randn((count, 2, frames), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return double(MEAN)[:, None] + TAU * noise, noise


def test_gradient_crosses_the_bridge_to_the_picked_frame_alone_and_independent_of_noise() -> None:
    """``M^T t^2 ((1 - t)^2 S + t^2 I)^-1 (M m - mu)``: every sample has the same, whatever noise it drew."""
    world = World(3, first_frame=False)
    z = samples(6, 3)[0]
    found = world.frame_gradient(z)
    v = (1 - T) ** 2 * S + T**2 * torch.eye(3, dtype=torch.float64)
    expected = M.T @ (T**2 * torch.linalg.inv(v) @ (M @ double(MEAN) - double(TARGET)))
    picked = found.abs().sum(1) > 0
    assert picked.sum(1).tolist() == [1] * 6
    assert len(picked.nonzero()[:, 1].unique()) > 1, "samples draw frames of their own"
    torch.testing.assert_close(found.sum(2), expected.expand(6, 2), rtol=0, atol=1e-10)


def test_directions_that_the_frame_teacher_cannot_see_get_no_gradient() -> None:
    blind = AnalyticAdapter(AnalyticConfig(shape=(2, 1, 1, 1), pixels=((1.0, 0.0), (0.5, 0.0))))
    z = torch.ones((3, 2, 1, 1, 1), dtype=torch.float64, requires_grad=True)
    CodecFrames(blind.codec, family(2, ((1.0, 0.0), (0.0, 1.0))).codec)(z).square().sum().backward()
    assert z.grad is not None
    assert torch.count_nonzero(z.grad[:, 1]) == 0
    assert torch.count_nonzero(z.grad[:, 0]) == 3


def test_expected_gradients_with_unequal_covariances() -> None:
    """``E g_m = M^T (I - a G_p)(M m - mu)`` and ``E g_tau = tr((G_q - G_p) a tau M M^T)``, within 4 standard errors."""
    world = World(covariance=double([[0.5, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.7]]), frame_videos=4_000)
    z, noise = samples(4_000)
    found, a = world.frame_gradient(z)[..., 0], 1 - T
    offset = M @ double(MEAN) - double(TARGET)
    expected = M.T @ (offset - a * world.frame_teacher.gain(T) @ offset)
    spread = torch.trace((world.frame_critic.gain(T) - world.frame_teacher.gain(T)) @ (a * TAU * M @ M.T))
    scales = (found * noise[..., 0]).sum(1)
    assert bool(((found.mean(0) - expected).abs() < 4 * found.std(0) / len(z) ** 0.5).all())
    assert float((scales.mean() - spread).abs()) < 4 * float(scales.std()) / len(z) ** 0.5


@pytest.mark.parametrize(("video", "frame"), [(1.0, 0.0), (1.0, 0.7), (0.0, 1.0)])
def test_the_student_ends_where_both_terms_add_to_nothing(video: float, frame: float) -> None:
    """``w_v W_A (m - mu_A) / 2 + w_f M^T W_B (M m - mu_B) / 3 = 0``: losses are means over 2 and over 3 channels."""
    world = World(video_weight=video, frame_weight=frame, allow_frames_only=True)
    identity, own = torch.eye(2, dtype=torch.float64), TAU**2 * torch.eye(2, dtype=torch.float64)
    w_a = video / 2 * T**2 * torch.linalg.inv((1 - T) ** 2 * own + T**2 * identity)
    w_b = frame / 3 * T**2 * torch.linalg.inv((1 - T) ** 2 * S + T**2 * torch.eye(3, dtype=torch.float64))
    pulls = w_a @ double((0.8, 0.6)) + M.T @ w_b @ double(TARGET)
    solution, mean = torch.linalg.solve(w_a + M.T @ w_b @ M, pulls), world.generator.mean
    for _ in range(200):
        with torch.no_grad():
            world.critic.mean.copy_(mean)
            world.frame_critic.mean.copy_(M @ mean)
        loss = next(world.method.losses(batch_of(4), 0))
        (gradient,) = torch.autograd.grad(loss.value, mean)
        with torch.no_grad():
            mean -= gradient
    torch.testing.assert_close(mean.detach(), solution, rtol=0, atol=1e-3)


class Pair(nn.Module):
    """Velocity at time 1 of two frames ``z = L e``."""

    def __init__(self, correlation: float) -> None:
        super().__init__()
        covariance = double([[1.0, correlation], [correlation, 1.0]])
        values, vectors = torch.linalg.eigh(covariance)
        self.root = nn.Parameter(vectors @ torch.diag(values.sqrt()) @ vectors.T)

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return x_t - torch.einsum("ij,bcjhw->bcihw", self.root, x_t)

    @property
    def covariance(self) -> Tensor:
        return (self.root @ self.root.T).detach()


class Centred(nn.Module):
    """Exact velocity of N(0, covariance) over the frames, at times of each sample."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        self.covariance = nn.Parameter(covariance)

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        a, x = (1 - t)[:, None, None], x_t[:, 0, :, 0, 0]
        v = a**2 * self.covariance + t[:, None, None] ** 2 * torch.eye(len(self.covariance), dtype=torch.float64)
        x0 = (a * self.covariance @ torch.linalg.solve(v, x[:, :, None]))[:, :, 0]
        return ((x - x0) / t[:, None])[:, None, :, None, None]


class Bare(DMD2FramesMethod):
    """The method without DMD's normaliser, with times in float64."""

    gradient = Exact.gradient

    def score_times(self, count: int) -> Tensor:
        return super().score_times(count).double()


class BareTerm(FrameTerm):
    """The frame term likewise, on both frames."""

    gradient = ExactTerm.gradient

    def times(self, seen: Seen, bounds: tuple[float, float]) -> Tensor:
        return super().times(seen, bounds).double()

    def picks(self, samples: int, frames: int) -> Picks:
        return [[0, 1]] * samples


def two_frames(start: float, steps: int = 160, **options: Any) -> tuple[float, float]:
    """Variance and correlation of two frames after training: the video teacher has 1 and .8, the frame teacher .5."""
    video, still = (AnalyticAdapter(AnalyticConfig(shape=(1, frames, 1, 1))) for frames in (2, 1))
    for adapter in (video, still):
        adapter.ensure_negative_conditioning()
    networks = {"student": Pair(start), "critic": Centred(torch.eye(2, dtype=torch.float64))}
    networks["teacher"] = Centred(double([[1.0, 0.8], [0.8, 1.0]]))
    networks["frame_teacher"], networks["frame_critic"] = Centred(double([[0.5]])), Centred(double([[1.0]]))
    handles = [
        RoleHandle(name, still if name.startswith("frame") else video, network, "teacher" not in name)
        for name, network in networks.items()
    ]
    config = DMD2FramesConfig(**{**OPTIONS, "frames_per_video": 2, "frame_videos": 256, **options})
    bundle = ModelBundle(handles, {("student", "frame_teacher"): FrameBridge()})
    method, student = Bare(config, bundle, Ladder((1.0,)), Doubles(5)), networks["student"]
    method.term = with_class(BareTerm, method.term)
    assert isinstance(student, Pair)
    condition = Condition({"analytic": {"shift": torch.zeros(256, dtype=torch.float64)}})
    batch, ends = Batch((256, 1, 2, 1, 1), condition, condition), []
    for step in range(steps):
        covariance = student.covariance
        with torch.no_grad():
            networks["critic"].covariance.copy_(covariance)  # type: ignore[operator, union-attr]
            networks["frame_critic"].covariance.copy_(covariance.diagonal().mean().view(1, 1))  # type: ignore[operator, union-attr]
        (gradient,) = torch.autograd.grad(next(method.losses(batch, 0)).value, student.root)
        with torch.no_grad():
            student.root -= 2.0 * (0.985**step if step > 60 else 1.0) * gradient
        ends.append(student.covariance)
    end = torch.stack(ends[-20:]).mean(0)
    return float(end.diagonal().mean()), float(end[0, 1] / end.diagonal().prod().sqrt())


class Doubles(RandomStreams):
    """Streams whose noise is float64."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return super().normal(shape, torch.float64)


def gain(covariance: Tensor, t: Tensor) -> Tensor:
    """``a (posterior mean's weight)`` ``[T, n, n]`` of N(0, covariance) at times ``[T]``, with ``a = 1 - t``."""
    a, identity = (1 - t)[:, None, None], torch.eye(len(covariance), dtype=torch.float64)
    return a**2 * covariance @ torch.linalg.inv(a**2 * covariance + (1 - a) ** 2 * identity)


def fixed_point(weight: float, frame_times: tuple[float, float]) -> tuple[float, float]:
    """Variance and correlation at which ``E_t[G_q - G_p] + weight E_t[g_q - g_p] = 0`` over video and frame times."""
    even = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    low, high = frame_times
    times, frames = even.clamp(0.02, 0.98), low + (high - low) * even
    teacher, still = gain(double([[1.0, 0.8], [0.8, 1.0]]), times), gain(double([[0.5]]), frames)
    root = Pair(0.2).root.detach()
    for _ in range(400):
        covariance = root @ root.T
        video = (gain(covariance, times) - teacher).mean(0)
        frame = (gain(covariance[:1, :1], frames) - still).mean()
        root = root - 0.5 * (video + weight * frame * torch.eye(2, dtype=torch.float64)) @ root
    covariance = root @ root.T
    return float(covariance[0, 0]), float(covariance[0, 1] / covariance[0, 0])


@pytest.mark.slow
def test_frames_alone_neither_keep_nor_restore_motion() -> None:
    """Variances become those of the frame teacher, and the correlation of the frames stays where it started.

    Nothing draws it back, so that it wanders a little with the draws.
    """
    found = two_frames(
        -0.5, 50, video_weight=0.0, frame_weight=1.0, allow_frames_only=True, frame_time_range=(0.02, 0.98)
    )
    assert found[0] == pytest.approx(0.5, abs=0.02)
    assert found[1] == pytest.approx(-0.5, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("frame_times", [(0.02, 0.98), (0.1, 0.3)])
def test_beside_a_video_teacher_frames_keep_their_motion(frame_times: tuple[float, float]) -> None:
    """Correlation .8 is the video teacher's; variance is between 1 and .5, nearer to 1 if frames count at low noise."""
    expected = fixed_point(1.0, frame_times)
    assert two_frames(0.2, frame_weight=1.0, frame_time_range=frame_times) == pytest.approx(expected, abs=0.01)
    assert 0.69 < expected[0] < 0.74
    assert expected[1] == pytest.approx(0.81, abs=0.01)


def test_without_its_term_the_student_trains_as_in_dmd2_to_the_bit(adapter: SpyAdapter) -> None:
    losses = []
    for name, options in (("dmd2", {}), ("dmd2_frames", {"frame_warmup_steps": 9}), ("dmd2_frames", {})):
        method = toy_method(name, adapter, mean=-0.5, std=1.2, **options)
        loss = next(method.losses(analytic_batch(adapter, 4), 0))
        loss.value.backward()
        losses.append((float(loss.value.detach()), [p.grad.clone() for p in method.bundle["student"].parameters()]))  # type: ignore[union-attr]
    assert losses[0][0] == losses[1][0] != losses[2][0]
    assert all(torch.equal(*pair) for pair in zip(losses[0][1], losses[1][1], strict=True))


def test_both_gradients_are_measured_at_the_students_sample(adapter: SpyAdapter) -> None:
    """The value is that of both losses; one frame per video is the video here, so both gradients are alike."""
    method = toy_method("dmd2_frames", adapter, mean=-0.5, std=1.2, frame_weight=0.5, video_weight=2.0)
    with torch.no_grad():
        method.bundle["frame_critic"].network.load_state_dict(method.bundle["critic"].network.state_dict())
    loss = next(method.losses(analytic_batch(adapter, 64), 0))
    value, metrics = float(loss.value.detach()), {name: float(value) for name, value in loss.metrics.items()}
    video = (value - 0.5 * metrics["frame_loss"]) / 2.0
    assert video == pytest.approx(0.5 * metrics["dmd_gradient_rms"] ** 2, rel=1e-5)
    assert metrics["gradient_cosine"] > 0.8
    assert isinstance(method, DMD2FramesMethod)
    assert method.balance is not None
    assert float(method.balance) == pytest.approx(metrics["frame_gradient"] / metrics["video_gradient"], rel=1e-5)


def test_times_of_teacher_and_critic_stay_where_they_are_known(adapter: SpyAdapter) -> None:
    """The frame critic is trained beyond the frame term's levels, and never above what the frame teacher knows."""
    method = toy_method("dmd2_frames", adapter, mean=-0.5, std=1.2, frame_time_range=(0.3, 0.5))
    assert isinstance(method, DMD2FramesMethod)
    method.term.bridge.noisiest = 0.9
    for step in range(40):
        list(method.losses(analytic_batch(adapter, 8, seed=step), step))
    asked = torch.cat([call.t for call in adapter.of(method.term.teacher)])
    learnt = torch.cat([call.t for call in adapter.of(method.term.critic) if call.with_grad])
    assert (asked.min() >= 0.3) & (asked.max() <= 0.5)
    assert (0.02 <= learnt.min() < 0.05) & (0.85 < learnt.max() <= 0.9)
    assert method.term.critic_times == (0.02, 0.9)


def test_frames_of_a_video_share_a_time_and_not_their_noise() -> None:
    world = World(4, frames_per_video=3)
    seen = world.term.frames(samples(5, 4)[0][..., None, None], batch_of(5, 4), gradient=False)
    times = FrameTerm.times(world.term, seen, (0.1, 0.4)).view(5, 3)
    assert (times == times[:, :1]).all()
    assert len(times[:, 0].unique()) == 5
    noise = world.term.noise(seen.stills.latents, seen).view(5, 3, -1)
    assert not torch.equal(noise[:, 0], noise[:, 1])
    shared = World(4, frames_per_video=3, share_frame_noise=True).term
    alike = shared.noise(seen.stills.latents, seen).view(5, 3, -1)
    assert torch.equal(alike[:, 0], alike[:, 1])
    assert not torch.equal(alike[0], alike[1])


def test_frames_are_drawn_evenly_from_different_latent_frames() -> None:
    term = World(4, frames_per_video=2).term
    term.bridge.temporal = 4
    picks = term.picks(3000, 4)
    assert {own[0] for own in picks} == {0}, "the first frame is always there"
    counts = torch.bincount(torch.tensor([own[1] for own in picks]), minlength=13)
    assert counts[0] == 0
    assert ((counts[1:] - 250).abs() < 4 * 250**0.5).all()
    anywhere = replace(term, config=term.config.model_copy(update={"first_frame": False}))
    latents = [[-(-frame // 4) for frame in own] for own in anywhere.picks(3000, 4)]
    assert all(len(set(own)) == 2 for own in latents)
    shares = torch.bincount(torch.tensor(latents).flatten(), minlength=4) / 6000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.03)
    with pytest.raises(UserError, match=r"method\.frames_per_video: 2, and a video has 1 latent frames"):
        term.picks(1, 1)


class VariancePreserving(AnalyticAdapter):
    """The Gaussian family behind a network that predicts noise or v on SDXL's noise levels."""

    def __init__(self, config: AnalyticConfig, prediction: str) -> None:
        super().__init__(config)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.grid = NoiseGrid({**betas, "prediction_type": prediction}, "DDIMScheduler")

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **_: Any) -> Tensor:
        native, x = variance_preserving(t), self.grid.network_input(x_t, t)
        alpha, sigma, mean = expand_time(native.alpha, x), expand_time(native.sigma, x), network.mean
        noise = sigma * (x - alpha * mean) / (alpha**2 * network.std**2 + sigma**2)
        v = alpha * noise - sigma * native.x0_from_noise(x, noise)
        return self.grid.flow_velocity(x_t, x, t, noise if self.grid.prediction == "epsilon" else v)


def test_the_bridge_does_not_care_for_what_a_teacher_predicts() -> None:
    """A flow student and one Gaussian as teacher behind three predictions: flow, noise and v on SDXL's levels."""
    gradients = []
    for prediction in ("flow", "epsilon", "v_prediction"):
        own = AnalyticConfig(shape=(1, 1, 4, 4), pixels=((0.5,),), means=(0.4,), stds=(0.6,))
        teacher = AnalyticAdapter(own) if prediction == "flow" else VariancePreserving(own, prediction)
        student = AnalyticAdapter(AnalyticConfig(shape=(1, 1, 4, 4)))
        for adapter in (teacher, student):
            adapter.ensure_negative_conditioning()
        nets = {role: teacher.folder.load_network("denoiser").double() for role in ("teacher", "critic")}
        with torch.no_grad():
            nets["critic"].mean += 0.3
        handles = [RoleHandle("student", student, student.folder.load_network("consistency").double(), trainable=True)]
        handles += [RoleHandle(role, teacher, net, role == "critic") for role, net in nets.items()]
        bundle = ModelBundle(handles, {("student", "teacher"): LatentBridge(student.codec, teacher.codec)})
        config = DMD2Config(teacher_guidance=1.0, score_time_range=(0.02, 0.93))  # up to what SDXL knows
        method = DMD2Method(config, bundle, Ladder((1.0,)), Doubles(5))
        z = torch.linspace(-1, 1, 128, dtype=torch.float64).view(8, 1, 1, 4, 4).requires_grad_()
        condition = Condition({"analytic": {"shift": torch.zeros(8, dtype=torch.float64)}})
        loss = method.student_loss(method.to_teacher(z), Batch((8, 1, 1, 4, 4), condition, condition))
        gradients.append(torch.autograd.grad(loss.value, z)[0])
    assert float(gradients[0].abs().max()) > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-6, atol=1e-9)
