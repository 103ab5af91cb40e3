"""Base of the options of model families."""

from __future__ import annotations

from typing import ClassVar, Literal

from fastvideo.distillation.config.base import Section

Level = Literal["closed form", "tiny equality", "tiny distillation", "real weights"]
"""Proof of a family: equal to a formula; equal to its stock pipeline on tiny random weights; distilled on tiny trained
ones; distilled on published ones."""


class AdapterConfig(Section):
    """Base of every family's options."""

    path: str = "tiny"
    """Weights: a model folder or a name; each family says what it accepts."""
    own_sizes: ClassVar[frozenset[str]] = frozenset()
    """Sizes whose default fits every model of the family; others are named for each model."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipeline classes (``_class_name`` in ``model_index.json``) that ``path`` may hold."""
    reversed_time: ClassVar[bool] = False
    """The network's own time falls towards pure noise."""
    level: ClassVar[Level] = "tiny equality"
    """Proof that the family has passed."""
