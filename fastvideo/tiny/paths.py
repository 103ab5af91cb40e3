"""Folders of the shipped weights: five diffusers pipelines and the judge."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE_FOLDER = WEIGHTS / "pipeline"
COGVIDEOX_FOLDER = WEIGHTS / "cogvideox"
SOFT_FOLDER = WEIGHTS / "soft"
STILLS_FOLDER = WEIGHTS / "stills"
CLASSIFIER_FOLDER = WEIGHTS / "classifier"
