"""Metrics against a teacher have a truth that is constructed or known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.rng import seeded
from fastvideo.distillation.sample import prompt_seeds
from fastvideo.errors import UserError
from fastvideo.evaluation.feature_distance import FeatureSpaces, components_for, halves_distance, split
from fastvideo.evaluation.instrument import Instrument, distractors
from fastvideo.evaluation.looks import LOOKS, looks
from fastvideo.evaluation.metric import Batch
from fastvideo.evaluation.relative import Looks, PromptMatch, SeedDiversity, ratio, transport
from fastvideo.evaluation.statistics import resample_counts
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tiny.world import TinyWorld

PROMPTS = 16


@pytest.fixture(scope="module", params=["tiny", "tiny_cogvideox"])
def teacher(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param)


@pytest.fixture(scope="module")
def real(teacher: LoadedModel) -> Batch:
    """Real videos as if the teacher had made them, with captions that name digit, colour and direction."""
    world = TinyWorld("heldout").sample(400, 3)
    whole = world.named.all(1).nonzero().flatten()[:PROMPTS]
    prompts = [world.captions[i] for i in whole]
    codec = teacher.adapter.codec
    return Batch(prompts, prompt_seeds(0, prompts), codec.encode(world.videos[whole]), codec)


def gaussian(count: int, mean: float, std: float, seed: int) -> Tensor:
    """Features ``[N, 1, 4]``."""
    return mean + std * torch.randn(count, 1, 4, generator=seeded(seed))


def moving(speed: int, contrast: float = 1.0) -> Tensor:
    """``[2, 3, 5, 16, 40]``: vertical stripes of smooth brightness that move ``speed`` pixels per frame."""
    place = torch.arange(40.0)
    frames = [torch.sin(2 * math.pi * (place - speed * t) / 20) for t in range(5)]
    return contrast * torch.stack(frames)[None, None, :, None].expand(2, 3, 5, 16, 40)


def test_distance_of_gaussians() -> None:
    """In units of the teacher's spread: a shift by one spread in each of four directions, and a doubled spread."""
    teacher, shifted, wide = (gaussian(20_000, m, s, i) for i, (m, s) in enumerate([(0, 3.0), (3.0, 3.0), (0, 6.0)]))
    spaces = FeatureSpaces.fit(teacher)
    once = torch.ones(1, len(teacher), dtype=torch.float64)
    assert spaces.distance(teacher, shifted, once, once)[0] == pytest.approx(4.0, rel=0.05)
    assert spaces.distance(teacher, wide, once, once)[0] == pytest.approx(4.0, rel=0.05)


def test_the_teachers_own_distance_is_the_floor() -> None:
    """A model with the teacher's distribution scores it, within the interval; another one does not."""
    teacher, same, other = gaussian(200, 0.0, 1.0, 0), gaussian(200, 0.0, 1.0, 1), gaussian(200, 1.0, 1.0, 2)
    spaces, counts = FeatureSpaces.fit(teacher), resample_counts(200, 0)
    floor = halves_distance(spaces, teacher, teacher, counts)[0]
    assert 0 < floor < 0.4
    assert halves_distance(spaces, teacher, same, counts)[0] == pytest.approx(floor, abs=0.3)
    assert halves_distance(spaces, teacher, other, counts)[0] > floor + 2


def test_halves_share_no_prompt_and_few_videos_get_few_components() -> None:
    first, second = split(11)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(11))
    assert [components_for(n) for n in (4, 64, 10_000)] == [1, 8, 32]


def test_prompts_are_found_in_real_videos_and_not_in_those_of_others(teacher: LoadedModel, real: Batch) -> None:
    """Videos under the captions of other videos: fewer than by chance are found, because the caption is wrong."""
    metric, counts = PromptMatch(Instrument(teacher), real.prompts), resample_counts(len(real.prompts), 0)
    right = metric.figures(metric.observe(real), {}, counts)
    shuffled = Batch(real.prompts, real.seeds, real.latents.roll(1, 0), real.codec)
    wrong = metric.figures(metric.observe(shuffled), {}, counts)
    assert right["prompt_match_chance"] == 0.2
    assert right["prompt_match"].value > 0.6  # type: ignore[union-attr]
    assert wrong["prompt_match"].value < 0.4  # type: ignore[union-attr]


def test_noise_matches_no_prompt_better_than_chance(teacher: LoadedModel, real: Batch) -> None:
    metric = PromptMatch(Instrument(teacher), real.prompts)
    noise = torch.randn(real.latents.shape, generator=seeded(0))
    found = metric.observe(Batch(real.prompts, real.seeds, noise, real.codec))["found"]
    assert float(found.mean()) < 0.5


def test_distractors_are_other_prompts_and_depend_on_the_prompt_alone() -> None:
    drawn = distractors(["a", "b", "c", "a"], 4)
    assert drawn[0] == drawn[3]
    assert sorted(drawn[1]) == ["a", "c"]
    with pytest.raises(UserError, match="tells different prompts apart"):
        distractors(["a", "a"])


def test_features_do_not_depend_on_the_batch(teacher: LoadedModel, real: Batch) -> None:
    instrument = Instrument(teacher)
    whole = instrument.features(real.latents[:4], real.seeds[:4])
    assert whole.shape[:2] == (4, 4)
    torch.testing.assert_close(
        whole[2:3], instrument.features(real.latents[2:3], real.seeds[2:3]), atol=1e-4, rtol=1e-4
    )


def test_a_still_has_no_motion_and_speed_is_pixels_per_frame() -> None:
    slow, fast = looks(moving(1))["motion"], looks(moving(2))["motion"]
    assert looks(moving(0))["motion"].tolist() == [0.0, 0.0]
    assert slow.tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    assert float(fast[0] / slow[0]) == pytest.approx(2.0, rel=0.1)
    torch.testing.assert_close(looks(moving(1, contrast=0.3))["motion"], slow)


def test_looks_of_constructed_videos() -> None:
    """A flat grey video has none of them; noise is sharper than stripes; flashing frames flicker."""
    grey = torch.zeros(1, 3, 5, 16, 16)
    assert all(float(value) == 0 for value in looks(grey).values())
    noise = torch.rand(1, 3, 5, 16, 40, generator=seeded(0)) * 2 - 1
    assert float(looks(noise)["sharpness"]) > 3 * float(looks(moving(1))["sharpness"][0])
    flash = grey.clone()
    flash[:, :, ::2] = 1.0
    assert float(looks(flash)["flicker"]) == pytest.approx(1.0)
    red = grey.clone()
    red[:, 0] = 1.0
    assert float(looks(red)["saturation"]) == pytest.approx(0.5)


@pytest.mark.parametrize(("frames", "lacking"), [(1, {"motion", "flicker"}), (2, {"flicker"}), (3, set())])
def test_short_videos_have_what_their_frames_can_tell(frames: int, lacking: set[str]) -> None:
    found = looks(moving(1)[:, :, :frames])
    assert set(LOOKS) - set(found) == lacking
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_a_model_that_is_its_teacher_has_ratio_one_exactly() -> None:
    seen, counts = looks(torch.rand(6, 3, 4, 8, 8, generator=seeded(0))), resample_counts(6, 0)
    figures = Looks().figures(seen, seen, counts)
    assert {name: figure.value for name, figure in figures.items()} == {  # type: ignore[union-attr]
        **dict.fromkeys(("motion", "sharpness", "saturation", "flicker"), 1.0),
        "motion_distance": 0.0,
    }


def test_ratio_and_transport() -> None:
    theirs, counts = torch.arange(1.0, 101.0), resample_counts(100, 0)
    half = ratio(theirs / 2, theirs, counts)
    assert (half.value, half.low, half.high, half.count) == pytest.approx((0.5, 0.5, 0.5, 100))
    assert math.isnan(ratio(theirs, theirs * 0, counts).value)
    assert transport(theirs + 10, theirs, counts).value == pytest.approx(10 / 50.5)
    assert transport(theirs.flip(0), theirs, counts).value == 0.0


def test_one_video_for_all_seeds_has_no_diversity(teacher: LoadedModel) -> None:
    metric = SeedDiversity(Instrument(teacher), seeds=4)
    varied = {"features": torch.randn(12, 8, generator=seeded(0))}
    same = {"features": varied["features"][::4].repeat_interleave(4, 0)}
    counts = resample_counts(3, 0)
    assert metric.figures(same, varied, counts)["seed_diversity"].value == 0.0  # type: ignore[union-attr]
    assert metric.figures(varied, varied, counts)["seed_diversity"].value == 1.0  # type: ignore[union-attr]
