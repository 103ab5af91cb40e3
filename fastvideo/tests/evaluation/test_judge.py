"""The judge on videos whose quality is known: real ones, noise, and real ones with the wrong prompts."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.types import UserError
from fastvideo.evaluation.judge import DIVERSITY_SEEDS, Judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(96, seed=5, reference=256)


def test_real_videos_score_well(judge: Judge) -> None:
    seen = judge.observe(judge.real_videos())
    found = judge.accuracies(seen)
    assert all(figure.value > 0.95 for figure in found.values())
    assert all(0 < figure.count < 96 for figure in found.values())


def test_both_distances_tell_real_from_grey(judge: Judge) -> None:
    real = judge.real_videos()
    features, pixels = judge.distances(judge.observe(real))
    grey_features, grey_pixels = judge.distances(judge.observe(0.3 * real))
    assert grey_features.value > 3 * features.value
    assert grey_pixels.value > 3 * pixels.value


def test_wrong_prompts_cost_accuracy_but_no_distance(judge: Judge) -> None:
    real = judge.real_videos()
    right, wrong = judge.score(real), judge.score(real.roll(1, 0))
    assert wrong["digit_accuracy"] < 0.5 < right["digit_accuracy"]
    assert wrong["frechet"] == pytest.approx(right["frechet"])
    assert wrong["frechet_pixel"] == pytest.approx(right["frechet_pixel"], rel=1e-3)


def test_copies_have_no_diversity_and_real_videos_about_one(judge: Judge) -> None:
    seen = judge.observe(judge.real_videos())
    task = judge.diversity_task
    count = len(task.positions)
    assert count > 0
    assert all((judge.named[task.positions] < 0).any(1))
    copies = judge.observe(judge.real_videos()[task.positions].repeat_interleave(DIVERSITY_SEEDS - 1, 0))
    assert judge.diversity(seen, copies).value == pytest.approx(0.0, abs=1e-5)


def test_the_prompts_depend_on_the_seed_and_the_reference_does_not(judge: Judge) -> None:
    other = Judge(96, seed=6, reference=256)
    assert other.prompts != judge.prompts
    torch.testing.assert_close(other.reference[0].mean, judge.reference[0].mean)


def test_videos_of_another_world_are_refused(judge: Judge) -> None:
    with pytest.raises(UserError, match=r"\[3, 9, 32, 32\].*\[3, 17, 64, 64\]"):
        judge.observe(torch.zeros(1, 3, 17, 64, 64))


def test_one_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 prompts"):
        Judge(1, seed=0)
