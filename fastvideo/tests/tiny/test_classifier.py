"""The judge's classifier as it is read."""

from __future__ import annotations

import torch

from fastvideo.evaluation.judge import CLASSIFIER_FOLDER
from fastvideo.tiny.classifier import TinyClassifier


def test_reading_it_draws_no_random_number() -> None:
    """A validation reads it in the middle of a run, whose networks may have dropout."""
    before = torch.get_rng_state()
    TinyClassifier.load(CLASSIFIER_FOLDER)
    assert torch.equal(torch.get_rng_state(), before)
