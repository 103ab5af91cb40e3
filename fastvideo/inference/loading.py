"""A model folder as something that can be sampled: its family, its network, and what its ``recipe.json`` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED, resolve_pipeline
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.registry import families, load_adapter
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import UserError

RECIPE = "recipe.json"
SIZES = ("height", "width", "num_frames", "max_sequence_length")
"""What a family's config must be told about any model but an embedded one: weights do not say it."""
TEACHER_STEPS = 50


@dataclass(frozen=True)
class LoadedModel:
    """One network with its family and its recipe (empty for a plain diffusers pipeline)."""

    source: str
    adapter: DistillAdapter[Any]
    network: nn.Module
    recipe: Mapping[str, Any]

    @property
    def denoiser(self) -> Denoiser:
        """The network with its family's conventions."""
        return Denoiser(self.adapter, self.network)

    @property
    def is_student(self) -> bool:
        """Whether it was distilled: its recipe holds the ladder it was trained for."""
        return "ladder" in self.recipe

    @property
    def ladder(self) -> Ladder:
        """The student's noise levels."""
        return Ladder(tuple(self.recipe["ladder"]))

    def sampler(
        self, steps: int | None = None, guidance: float | None = None, ladder: Sequence[float] = ()
    ) -> SamplerSpec:
        """The sampler this model is meant for, with the given steps and guidance where they are given.

        ``ladder`` are times that the user names instead of steps: the student's sampler walks them, trained for or not.

        Raises:
            UserError: for a number of steps that a student was not trained for, or below 1; for an unknown sampler; for
                a ladder that is none, beside steps, or of a model that is no student.
        """
        if ladder:
            return self._over(ladder, steps, guidance)
        if steps is not None and steps < 1:
            raise UserError(f"--steps must be at least 1, got {steps}")
        default = self.recipe.get("guidance", 1.0 if self.is_student else self.adapter.folder.published_guidance)
        guidance = float(default if guidance is None else guidance)
        if self.is_student:
            kind = student_sampler(self.recipe)
            if kind == "flow_map" and steps not in (None, 1, len(self.ladder)):
                return SamplerSpec.student(Ladder.uniform(steps), guidance, kind)  # it jumps between any two times
            return SamplerSpec.student(self.ladder.first(steps or len(self.ladder)), guidance, kind)
        return SamplerSpec.teacher(self.adapter.folder.teacher_times(steps or TEACHER_STEPS), guidance)

    def _over(self, ladder: Sequence[float], steps: int | None, guidance: float | None) -> SamplerSpec:
        if steps is not None:
            raise UserError("a ladder says how many steps there are: give --ladder or --steps, not both")
        if not self.is_student:
            raise UserError(f"--ladder is for students; {self.source} is none: give --steps")
        default = float(self.recipe.get("guidance", 1.0))
        chosen = default if guidance is None else guidance
        return SamplerSpec.student(Ladder(tuple(ladder)), chosen, student_sampler(self.recipe))


def load_model(folder: str, options: Mapping[str, Any] | None = None, device: str = "cpu") -> LoadedModel:
    """Load the network in ``folder`` (a path, a hub id or ``tiny``); text encoder and VAE follow on first use.

    Args:
        options: fields of the family's config that override the recipe's.

    Raises:
        UserError: if the folder is not a diffusers pipeline of a known family, its recipe is not readable, neither
            recipe nor options say which size the model has, or an option is wrong.
    """
    source = resolve_pipeline(folder, tuple(families()))
    recipe = _read_recipe(source)
    family = load_adapter(families()[pipeline_class(source)])
    fields = {**recipe.get("model", {}), **(options or {}), "path": source}
    if folder not in EMBEDDED:
        _check_sizes(folder, fields, family.Config.model_fields)
    config = validate(family.Config, fields, f"of the model in {folder!r}")
    adapter = family(config, device)
    return LoadedModel(source, adapter, adapter.folder.load_network().requires_grad_(False), recipe)


def load_recipe(folder: str) -> dict[str, Any]:
    """The ``recipe.json`` of a model folder; empty for a plain pipeline.

    Raises:
        UserError: if the folder is not a pipeline of a known family or the recipe is not readable.
    """
    return _read_recipe(resolve_pipeline(folder, tuple(families())))


def student_sampler(recipe: Mapping[str, Any]) -> SamplerKind:
    """The sampler that a student's recipe names; re-noising where it names none.

    Raises:
        UserError: if there is no such sampler.
    """
    kind = recipe.get("sampler", "renoise")
    if kind not in get_args(SamplerKind):
        raise UserError(f"{RECIPE}: unknown sampler {kind!r}, one of {', '.join(get_args(SamplerKind))} is expected")
    return cast(SamplerKind, kind)


def _check_sizes(folder: str, fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse to sample at the config's defaults, which are the sizes of the embedded model."""
    missing = [name for name in SIZES if name in known and name not in fields]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(
            f'model {folder!r} does not say which size it is made for: give {flags} (or write a "model" section with '
            f"{', '.join(missing)} into its {RECIPE})"
        )


def pipeline_class(source: str) -> str:
    """``_class_name`` of a pipeline folder that :func:`resolve_pipeline` has checked."""
    return str(json.loads((Path(source) / "model_index.json").read_text())["_class_name"])


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
