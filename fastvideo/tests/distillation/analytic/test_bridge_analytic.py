"""DMD2 whose teacher lives in another latent space, against closed forms: linear codecs, Gaussians, exact critics.

Student latents ``z = m + tau e``, pixels ``A_s z``, teacher latents ``M z`` with ``M = pinv(A_t) A_s``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.bridge import LatentBridge, bridge_between
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import ModelBundle, RoleHandle, same_space
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, Condition, UserError
from fastvideo.tests.preparing import preparer

T = 0.625
STUDENT_PIXELS = ((1.0, 0.5), (-0.3, 1.2), (0.4, 0.1))
TEACHER_PIXELS = ((0.8, 0.0, 0.2), (0.1, 1.1, 0.0), (0.0, -0.4, 0.9))
"""Two student channels, three teacher channels, three pixel channels."""
TAU, MEAN, TARGET = 0.4, (0.3, -0.5), (0.9, 0.2, -0.4)


class Generator(nn.Module):
    """Velocity at time 1 of the student ``z = mean + tau noise``."""

    def __init__(self, mean: Tensor, tau: float) -> None:
        super().__init__()
        self.mean, self.tau = nn.Parameter(mean.clone()), tau

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return x_t - (self.mean.view(1, -1, 1, 1, 1) + self.tau * x_t)


class Correlated(nn.Module):
    """Exact velocity of N(mean, covariance) over the channels."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean, self.covariance = nn.Parameter(mean.clone()), covariance

    def gain(self, t: float) -> Tensor:
        """``a S (a^2 S + t^2 I)^-1`` with ``a = 1 - t``: the posterior mean's weight on ``x_t - a mean``."""
        a, identity = 1 - t, torch.eye(len(self.covariance), dtype=torch.float64)
        return a * self.covariance @ torch.linalg.inv(a**2 * self.covariance + t**2 * identity)

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        time, x = float(t[0]), x_t[:, :, 0, 0, 0]
        x0 = self.mean + (x - (1 - time) * self.mean) @ self.gain(time).T
        return ((x - x0) / time)[:, :, None, None, None]


def family(channels: int, pixels: tuple[tuple[float, ...], ...]) -> AnalyticAdapter:
    adapter = AnalyticAdapter(AnalyticConfig(shape=(channels, 1, 1, 1), pixels=pixels))
    adapter.ensure_negative_conditioning()
    return adapter


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


M = torch.linalg.pinv(double(TEACHER_PIXELS)) @ double(STUDENT_PIXELS)
S = TAU**2 * M @ M.T


class World:
    """Student, teacher and an exact critic; the two families and the bridge between them are the real ones."""

    def __init__(self, covariance: Tensor = S, method: type[DMD2Method] = DMD2Method) -> None:
        student, teacher = family(2, STUDENT_PIXELS), family(3, TEACHER_PIXELS)
        self.generator = Generator(double(MEAN), TAU)
        self.teacher = Correlated(double(TARGET), covariance)
        self.critic = Correlated(M @ double(MEAN), S)
        handles = [
            RoleHandle("student", student, self.generator, trainable=True),
            RoleHandle("teacher", teacher, self.teacher),
            RoleHandle("critic", teacher, self.critic, trainable=True),
        ]
        bridges = {("student", "teacher"): LatentBridge(student.codec, teacher.codec)}
        config = DMD2Config(teacher_guidance=1.0, score_time_range=(T, T))
        self.method = method(config, ModelBundle(handles, bridges), Ladder((1.0,)), RandomStreams(3))

    def gradient(self, z: Tensor) -> Tensor:
        """Gradient of the student's loss on each latent ``z`` ``[B, 2]``, times the number of elements it averages."""
        leaf = z.detach().clone().requires_grad_()
        bridged = self.method.to_teacher(leaf[:, :, None, None, None])
        self.method.student_loss(bridged, batch_of(len(z))).value.backward()
        assert leaf.grad is not None
        return leaf.grad * bridged.numel()


class Unnormalised(DMD2Method):
    """DMD2 without DMD's normaliser, so that fixed points have a closed form."""

    def gradient(self, x0: Tensor, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        return fake - real


def batch_of(count: int) -> Batch:
    condition = Condition({"analytic": {"shift": torch.zeros(count, dtype=torch.float64)}})
    return Batch((count, 2, 1, 1, 1), condition, condition)


def samples(count: int) -> tuple[Tensor, Tensor]:
    noise = torch.randn((count, 2), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return double(MEAN) + TAU * noise, noise


def test_gradient_crosses_the_bridge_per_sample_and_independent_of_noise() -> None:
    """``M^T t^2 ((1 - t)^2 S + t^2 I)^-1 (M m - mu)``: every sample has the same, whatever noise it drew."""
    found = World(method=Unnormalised).gradient(samples(6)[0])
    v = (1 - T) ** 2 * S + T**2 * torch.eye(3, dtype=torch.float64)
    expected = M.T @ (T**2 * torch.linalg.inv(v) @ (M @ double(MEAN) - double(TARGET)))
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-10)


def test_the_normaliser_is_that_of_the_teachers_space() -> None:
    world, plain = World(), World(method=Unnormalised)
    z = samples(5)[0]
    found, bare = world.gradient(z), plain.gradient(z)
    ratios = bare / found
    torch.testing.assert_close(ratios[:, 0], ratios[:, 1], rtol=1e-10, atol=0)
    assert len(ratios[:, 0].unique()) == 5


def test_directions_that_the_teacher_cannot_see_get_no_gradient() -> None:
    """The null space of ``M`` gets exactly nothing: here the student has a channel that no pixel shows."""
    student, teacher = family(2, ((1.0, 0.0), (0.5, 0.0))), family(2, ((1.0, 0.0), (0.0, 1.0)))
    z = torch.ones((3, 2, 1, 1, 1), dtype=torch.float64, requires_grad=True)
    LatentBridge(student.codec, teacher.codec)(z).square().sum().backward()
    assert z.grad is not None
    assert torch.count_nonzero(z.grad[:, 1]) == 0
    assert torch.count_nonzero(z.grad[:, 0]) == 3


def test_expected_gradients_with_unequal_covariances() -> None:
    """``E g_m = M^T (I - a G_p)(M m - mu)`` and ``E g_tau = tr((G_q - G_p) a tau M M^T)``, within 4 standard errors."""
    world = World(double([[0.5, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.7]]), Unnormalised)
    z, noise = samples(100_000)
    found, a = world.gradient(z), 1 - T
    means, scales = found, (found * noise).sum(1)
    offset = M @ double(MEAN) - double(TARGET)
    expected = M.T @ (offset - a * world.teacher.gain(T) @ offset)
    spread = torch.trace((world.critic.gain(T) - world.teacher.gain(T)) @ (a * TAU * M @ M.T))
    assert bool(((means.mean(0) - expected).abs() < 4 * means.std(0) / len(z) ** 0.5).all())
    assert float((scales.mean() - spread).abs()) < 4 * float(scales.std()) / len(z) ** 0.5


@pytest.mark.parametrize("weight", [0.0, 0.7, 1e6])
def test_fixed_point_of_two_teachers(weight: float) -> None:
    """A teacher in the student's space and ``weight`` times one behind the bridge: the point where both gradients add
    to nothing, ``W_A (m - mu_A) + weight M^T W_B (M m - mu_B) = 0``. Their ends are one teacher alone."""
    world, near = World(method=Unnormalised), family(2, STUDENT_PIXELS)
    own, mu = TAU**2 * torch.eye(2, dtype=torch.float64), double((0.8, 0.6))
    nets = {"student": world.generator, "teacher": Correlated(mu, own), "critic": Correlated(double(MEAN), own)}
    handles = [RoleHandle(name, near, net, trainable=name != "teacher") for name, net in nets.items()]
    alone = Unnormalised(world.method.config, ModelBundle(handles), Ladder((1.0,)), RandomStreams(5))
    share, mean = 1 / (1 + weight), world.generator.mean
    w_a = T**2 * torch.linalg.inv((1 - T) ** 2 * own + T**2 * torch.eye(2, dtype=torch.float64))
    w_b = T**2 * torch.linalg.inv((1 - T) ** 2 * S + T**2 * torch.eye(3, dtype=torch.float64))
    pulled = share * w_a + (1 - share) * M.T @ w_b @ M
    solution = torch.linalg.solve(pulled, share * w_a @ mu + (1 - share) * M.T @ w_b @ double(TARGET))
    for _ in range(200):
        with torch.no_grad():
            world.critic.mean.copy_(M @ mean)
            nets["critic"].mean.copy_(mean)
        batch, z = batch_of(4), alone.rollout(batch_of(4))
        both = share * 2 * alone.student_loss(z, batch).value
        both = both + (1 - share) * 3 * world.method.student_loss(world.method.to_teacher(z), batch).value
        (gradient,) = torch.autograd.grad(both, mean)
        with torch.no_grad():
            mean -= 0.5 * gradient
    torch.testing.assert_close(mean.detach(), solution, rtol=0, atol=1e-3)


def config(teacher: dict[str, Any] | None, **changes: Any) -> Any:
    section = {"model": teacher} if teacher else {}
    roles = {"student": {"trainable": True, "path": "consistency"}, "teacher": {"trainable": False, **section}}
    roles["critic"] = {"trainable": True, **section}
    values = {"distill_model": "analytic", "distill_method": "dmd2", "output": "unused", "model": {}, "roles": roles}
    values["method"] = {"generator_update_interval": 1, "teacher_guidance": 1.0}
    return config_of(values | changes, "test")


def losses_of(wanted: Any) -> list[float]:
    from fastvideo.distillation.types import RawBatch

    method = build_method(wanted, build_adapter(wanted))
    batch = preparer(method.student.adapter)(RawBatch(("0.5", "-1", "")))
    return [float(loss.value.detach()) for step in range(3) for loss in method.losses(batch, step)]


def test_a_second_family_of_the_same_latent_space_changes_no_bit() -> None:
    """``weights: [2]`` is the same distribution in another section: an adapter of its own, and the identity bridge."""
    other = config({"weights": [2.0]})
    method = build_method(other, build_adapter(other))
    assert method.teacher.adapter is not method.student.adapter
    assert method.teacher.adapter is method.critic.adapter
    assert method.to_teacher is same_space
    assert method.notes == ("samples reach teacher and critic as they are: the latent space is the student's",)
    assert losses_of(other) == losses_of(config(None))


def test_roles_with_one_section_share_a_family_and_a_bridge() -> None:
    wanted = config({"pixels": [[0.5]]})
    method = build_method(wanted, build_adapter(wanted))
    assert isinstance(method.to_teacher, LatentBridge)
    (note,) = method.notes
    assert note.startswith("samples reach teacher and critic through pixels, whole videos that are decoded and encoded")
    assert note.endswith("latents of a clip differ by 100.00% rms, and up to 1% is taken for one space")
    assert method.bundle.bridge("teacher", "critic") is same_space
    x0 = torch.ones(1, 1, 1, 4, 4)
    torch.testing.assert_close(method.to_teacher(x0), 2 * x0)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ({"family": "wam"}, {}, r"roles\.teacher\.model\.family: unknown model 'wam'.*did you mean 'wan'"),
        ({"family": True}, {}, r"roles\.teacher\.model\.family: the name of a model family is expected.*got True"),
        ({"famly": "wan"}, {}, r"roles\.teacher\.model\.famly: unknown key; did you mean 'family'"),
        ({"mean": [1.0]}, {}, r"roles\.teacher\.model\.mean: unknown key; did you mean 'means'"),
        ({"shape": [1, 0, 4, 4]}, {}, r"roles\.teacher\.model\.shape\.1: "),
    ],
)
def test_bad_sections_are_refused_with_their_key(teacher: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(teacher, **changes)


def test_teacher_and_critic_in_two_spaces_are_refused() -> None:
    wanted = config({"pixels": [[0.5]]})
    roles = {**wanted.model_dump()["roles"], "critic": {"trainable": True, "model": {"pixels": [[0.25]]}}}
    wrong = config(None, roles=roles)
    with pytest.raises(UserError, match=r"roles\.critic\.model: teacher and critic .* one latent space"):
        build_method(wrong, build_adapter(wrong))


def test_a_method_that_cannot_cross_spaces_refuses() -> None:
    roles = {"student": {"trainable": True}, "teacher": {"trainable": False, "model": {"pixels": [[0.5]]}}}
    wanted = config(None, distill_method="cm", method={}, roles=roles)
    with pytest.raises(UserError, match=r"roles\.teacher\.model: .*latent space is not the student's"):
        build_method(wanted, build_adapter(wanted))


def test_the_students_family_is_the_runs() -> None:
    roles = config(None).model_dump()["roles"]
    roles["student"] |= {"path": None, "model": {"family": "wan"}}
    with pytest.raises(UserError, match=r"roles\.student\.model: the student's family is the run's"):
        config(None, roles=roles)


def test_sizes_that_do_not_meet_are_refused() -> None:
    codecs = [family(1, ((1.0,),)).codec, family(2, ((1.0, 0.0), (0.0, 1.0))).codec]
    bridge, _ = bridge_between(codecs[1], family(2, ((1.0, 0.5), (0.0, 1.0))).codec, ["teacher"])
    with pytest.raises(UserError, match="one height, width and num_frames"):
        bridge(torch.ones(1, 2, 3, 1, 1))
