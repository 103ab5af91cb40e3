"""A state of several parts: each weighs as it says, whatever its size, and one part changes no number."""

from __future__ import annotations

from functools import cached_property

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticCodec, AnalyticConfig
from fastvideo.distillation.methods.consistency_model.discrete import sample_distances
from fastvideo.distillation.methods.distribution_matching.dmd2 import dmd_gradient
from fastvideo.distillation.parts import Part, Parts
from fastvideo.distillation.registry import METHODS
from fastvideo.distillation.tangent import unit_rms
from fastvideo.distillation.types import Batch, Condition, mean_over_generated
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, analytic_batch, toy_method

WHOLE_VIDEO = ("causal_kd", "causal_cd", "causal_sft", "causvid", "self_forcing", "streaming_tuning", "dmd2_frames")
"""Methods that need frames, which a flat state does not have."""
TWO = Parts((Part("video", (2, 3, 2)), Part("sound", (4,))))


class PartsAdapter(SpyAdapter):
    """The analytic family with a flat state of parts."""

    def __init__(self, parts: Parts | None) -> None:
        self.own = parts
        super().__init__(AnalyticConfig(means=(MEAN,), stds=(STD,), shape=TWO.shape))
        self.ensure_negative_conditioning()

    @cached_property
    def codec(self) -> AnalyticCodec:
        class Codec(AnalyticCodec):
            parts = self.own

        return Codec(self.config, self.device)


def losses(name: str, parts: Parts | None) -> list[Tensor]:
    """Losses and metrics of the first steps of a method whose student is not at the truth."""
    adapter = PartsAdapter(parts)
    method, found = toy_method(name, adapter, mean=0.2, std=0.7), list[Tensor]()
    for step in range(2):
        for loss in method.losses(analytic_batch(adapter, 3), step):
            found += [loss.value, *loss.metrics.values()]
            if loss.value.requires_grad:
                loss.value.backward()
    trained = [p.grad for handle in method.bundle for p in handle.network.parameters() if p.grad is not None]
    return [*found, *trained]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WHOLE_VIDEO])
def test_one_part_gives_every_method_the_bits_of_none_and_two_do_not(name: str) -> None:
    plain, one, two = (losses(name, parts) for parts in (None, Parts((Part("all", TWO.shape[1:]),)), TWO))
    assert len(plain) == len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))
    differs = not all(torch.equal(a, b) for a, b in zip(plain, two, strict=True))
    assert differs == (name != "ladd")  # no mean over a state: a discriminator alone judges it


def weighed(video: float, sound: float) -> Parts:
    """Two parts of 12 and 4 numbers, with weights."""
    return Parts((Part("video", (12,), video), Part("sound", (4,), sound)))


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    """Three samples of positive numbers; sounds are a hundred times as large."""
    found = torch.rand(3, *TWO.shape, generator=generator, dtype=torch.float64) + 0.1
    found[..., 12:] *= 100
    return found


@pytest.mark.parametrize(("video", "sound"), [(1.0, 1.0), (1.0, 10.0), (3.0, 0.5)])
def test_a_mean_weighs_the_means_of_its_parts(x: Tensor, video: float, sound: float) -> None:
    parts = weighed(video, sound)
    wanted = (video * x[..., :12].mean((1, 2, 3, 4)) + sound * x[..., 12:].mean((1, 2, 3, 4))) / (video + sound)
    torch.testing.assert_close(mean_over_generated(x, parts).flatten(), wanted)
    batch = Batch(tuple(x.shape), Condition({}), Condition({}), parts=parts)
    torch.testing.assert_close(batch.mean(x), wanted.mean())
    distances = sample_distances(x, torch.zeros_like(x), parts, None)
    torch.testing.assert_close(distances, 16 * mean_over_generated(x.square(), parts).flatten())


def test_a_tenfold_weight_is_a_tenfold_loss_of_that_part(x: Tensor) -> None:
    """The errors of sound times ten at weight 1 are those at weight 10, but for the sum of the weights."""
    louder = x.clone()
    louder[..., 12:] *= 10
    one, ten = mean_over_generated(louder, weighed(1.0, 1.0)), mean_over_generated(x, weighed(1.0, 10.0))
    torch.testing.assert_close(2 * one, 11 * ten)


def test_dmd_and_tangents_are_normalised_in_each_part_alone(x: Tensor) -> None:
    parts, real, fake = weighed(1.0, 1.0), torch.zeros_like(x), 0.1 * x
    whole = dmd_gradient(x, real=real, fake=fake, given=parts)
    alone = [dmd_gradient(part, real=0 * part, fake=0.1 * part) for part in (x[..., :12], x[..., 12:])]
    torch.testing.assert_close(whole, torch.cat(alone, dim=-1))
    tangents = [unit_rms(part, 0.1) for part in (x[..., :12], x[..., 12:])]
    torch.testing.assert_close(unit_rms(x, 0.1, parts), torch.cat(tangents, dim=-1))


def test_parts_come_out_as_they_went_in(generator: torch.Generator) -> None:
    parts = [torch.rand(5, *shape, generator=generator) for shape in ((2, 3, 2), (4,))]
    state = TWO.join(parts)
    assert tuple(state.shape) == (5, *TWO.shape)
    assert all(torch.equal(a, b) for a, b in zip(TWO.split(state), parts, strict=True))
