"""Accuracy counts what captions name; intervals behave; rows become the promised JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastvideo.distillation.rng import normal, seeded
from fastvideo.evaluation.metrics import Row, accuracies, diversity, named_attributes, spread
from fastvideo.evaluation.statistics import Estimate, estimate, resample_counts, weighted_mean

CAPTIONS = ("a green seven moving up and left", "a red digit", "a three", "a digit moving down")
ISSUE_KEYS = [
    *("digit_accuracy", "colour_accuracy", "direction_accuracy", "frechet", "frechet_pixel", "frechet_floor"),
    *("diversity", "samples", "network_calls", "denoise_seconds_per_video"),
]


def row(**changes: object) -> Row:
    """A row with plausible figures."""
    figures: dict[str, object] = dict.fromkeys(
        ("digit_accuracy", "colour_accuracy", "direction_accuracy", "diversity"), Estimate(0.97, 0.95, 0.99, 380)
    )
    distances = {"frechet": Estimate(30.0, 25.0, 35.0, 512), "frechet_pixel": Estimate(90.0, 80.0, 101.0, 512)}
    plain = {
        "frechet_floor": 10.0,
        "frechet_pixel_floor": 26.0,
        "samples": 512,
        "network_calls": 4,
        "steps": 4,
        "guidance": 1.0,
        "sampler": "renoise",
        "denoise_seconds_per_video": 0.01,
        "end_to_end_seconds_per_video": 0.03,
        "batch_size": 64,
    }
    return Row(**{**figures, **distances, **plain, **changes})  # type: ignore[arg-type]


def test_what_captions_name() -> None:
    assert named_attributes(CAPTIONS).tolist() == [[7, 1, 4], [-1, 0, -1], [3, -1, -1], [-1, -1, 1]]


def test_accuracy_counts_only_what_is_named() -> None:
    read = torch.tensor([[7, 1, 0], [9, 0, 3], [5, 5, 5], [0, 0, 1]])
    found = accuracies(read, named_attributes(CAPTIONS), resample_counts(4, 0))
    assert (found["digit_accuracy"].value, found["digit_accuracy"].count) == (0.5, 2)
    assert (found["colour_accuracy"].value, found["colour_accuracy"].count) == (1.0, 2)
    assert (found["direction_accuracy"].value, found["direction_accuracy"].count) == (0.5, 2)


def test_attribute_that_no_prompt_names_is_undefined_and_null_in_json() -> None:
    found = accuracies(torch.zeros(3, 3).long(), named_attributes(["a digit"] * 3), resample_counts(3, 0))
    assert math.isnan(found["digit_accuracy"].value)
    assert found["digit_accuracy"].count == 0
    assert row(digit_accuracy=found["digit_accuracy"]).to_dict()["digit_accuracy"] is None


def test_interval_of_a_proportion_covers_the_truth() -> None:
    """95 % intervals hold the truth in about 95 of 100 repetitions (200 observations each)."""
    covered = 0
    for seed in range(100):
        hits = (normal((200,), seeded(seed)) < 0.8416).double()  # the 0.8 quantile
        value, resampled = weighted_mean(hits, resample_counts(200, seed, 100))
        found = estimate(value, resampled, 200, highest=1.0)
        covered += found.low <= 0.8 <= found.high
    assert covered >= 86


def test_interval_stays_in_range_and_holds_the_value() -> None:
    found = estimate(0.99, torch.linspace(0.5, 1.0, 50).double(), 50, highest=1.0)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_resamples_have_the_sample_size() -> None:
    assert resample_counts(37, 0).sum(1).unique().tolist() == [37.0]


def test_spread_is_the_mean_distance_of_pairs() -> None:
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0]] * 3])
    assert spread(features).tolist() == pytest.approx([10.0 / 3, 0.0])


def test_diversity_is_relative_to_real_videos() -> None:
    features = normal((16, 4, 64), seeded(0), dtype=torch.float64)
    counts = resample_counts(16, 0)
    assert diversity(features, spread(features), counts).value == pytest.approx(1.0)
    assert diversity(0.5 * features, spread(features), counts).value == pytest.approx(0.5)
    assert diversity(features[:, :1].expand(-1, 4, -1), spread(features), counts).value == 0.0


def test_row_has_the_promised_keys_and_is_json() -> None:
    values = json.loads(json.dumps(row().to_dict(), allow_nan=False))
    assert set(ISSUE_KEYS) <= set(values)
    assert values["intervals"]["frechet"] == [25.0, 35.0]
    assert values["counts"]["digit_accuracy"] == 380
