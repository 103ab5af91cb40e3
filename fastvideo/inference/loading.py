"""A model folder as something that can be sampled: its family, its network, and what its ``recipe.json`` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.loading import resolve_pipeline
from fastvideo.distillation.builder import load_adapter
from fastvideo.distillation.config import validate
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import UserError
from fastvideo.inference.sampler import SamplerSpec

FAMILIES = {"WanPipeline": "wan"}
"""The adapter of each diffusers pipeline class, as written in ``model_index.json``."""
RECIPE = "recipe.json"
TEACHER_STEPS = 50
TEACHER_GUIDANCE = 5.0
"""Wan's published guidance, for a teacher whose folder names none."""


@dataclass(frozen=True)
class LoadedModel:
    """One network with its family and its recipe (empty for a plain diffusers pipeline)."""

    source: str
    adapter: DistillAdapter[Any]
    network: nn.Module
    recipe: Mapping[str, Any]

    @property
    def is_student(self) -> bool:
        """Whether it was distilled: its recipe holds the ladder it was trained for."""
        return "ladder" in self.recipe

    @property
    def ladder(self) -> Ladder:
        """The student's noise levels."""
        return Ladder(tuple(self.recipe["ladder"]))

    def sampler(self, steps: int | None = None, guidance: float | None = None) -> SamplerSpec:
        """The sampler this model is meant for, with the given steps and guidance where they are given.

        Raises:
            UserError: for a number of steps that a student was not trained for, or below 1.
        """
        if steps is not None and steps < 1:
            raise UserError(f"--steps must be at least 1, got {steps}")
        default = self.recipe.get("guidance", 1.0 if self.is_student else TEACHER_GUIDANCE)
        guidance = float(default if guidance is None else guidance)
        if self.is_student:
            return SamplerSpec.student(self.ladder.first(steps or len(self.ladder)), guidance)
        return SamplerSpec.teacher(self.adapter.teacher_times(steps or TEACHER_STEPS), guidance)


def load_model(folder: str, options: Mapping[str, Any] | None = None, device: str = "cpu") -> LoadedModel:
    """Load the network in ``folder`` (a path, a hub id or ``tiny``); text encoder and VAE follow on first use.

    Args:
        options: fields of the family's config that override the recipe's.

    Raises:
        UserError: if the folder is not a diffusers pipeline of a known family, its recipe is not readable, or an
            option is wrong.
    """
    source = resolve_pipeline(folder, tuple(FAMILIES))
    recipe = _read_recipe(source)
    family = load_adapter(FAMILIES[_pipeline_class(source)])
    fields = {**recipe.get("model", {}), **(options or {}), "path": source}
    config = validate(family.Config, fields, f"of the model in {folder!r}")
    adapter = family(config, device)
    return LoadedModel(source, adapter, adapter.load_network().requires_grad_(False), recipe)


def load_recipe(folder: str) -> dict[str, Any]:
    """The ``recipe.json`` of a model folder; empty for a plain pipeline.

    Raises:
        UserError: if the folder is not a pipeline of a known family or the recipe is not readable.
    """
    return _read_recipe(resolve_pipeline(folder, tuple(FAMILIES)))


def _pipeline_class(source: str) -> str:
    """``_class_name`` of the pipeline; :func:`resolve_pipeline` has checked a folder's, not a hub id's."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(source, "model_index.json"))
        except OSError as error:
            raise UserError(f"cannot read the model {source!r}: {str(error).strip().splitlines()[0]}") from error
    name = str(json.loads(index.read_text()).get("_class_name"))
    if name not in FAMILIES:
        raise UserError(f"model {source!r} holds a {name}; known are {', '.join(FAMILIES)}")
    return name


def _read_recipe(source: str) -> dict[str, Any]:
    path = Path(source) / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: an object is expected, found {type(recipe).__name__}")
    return recipe
