"""Folders of the shipped weights: three diffusers pipelines and the judge."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE_FOLDER = WEIGHTS / "pipeline"
COGVIDEOX_FOLDER = WEIGHTS / "cogvideox"
CLASSIFIER_FOLDER = WEIGHTS / "classifier"
