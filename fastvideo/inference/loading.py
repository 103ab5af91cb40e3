"""A model folder as a network to sample: its family, its weights, its ``recipe.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, cast, get_args

import torch
from torch import nn

from fastvideo.data.model import check_sizes, find_model
from fastvideo.devices import check_device
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.folder import read_recipe
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.config.base import by_time
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.grids import uniform_ladder
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.registry import load_adapter
from fastvideo.distillation.rollout import Ladder, SamplerKind
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.stream_recipe import streaming_of
from fastvideo.distillation.types import UserError

RECIPE = "recipe.json"
TEACHER_STEPS = 50
"""Steps of a teacher whose recipe has no `sampling_steps`."""
OF_THE_MACHINE = frozenset({"attention_backend", "compile_blocks"})
"""Fields of a recipe's ``model`` that say what a run trained with on its machine: another one may have neither."""


def _guidance(value: object) -> GuidanceValue:
    """A model's guidance; UserError for a recipe that holds none."""
    try:
        return by_time(value)
    except ValueError as error:
        raise UserError(f"{RECIPE}: {error}") from error


def _steps(value: object) -> int:
    """A teacher's own steps; UserError for a recipe that holds something else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{RECIPE}: sampling_steps must be a whole number from 1, got {value!r}")
    return value


@dataclass(frozen=True)
class OpenedModel:
    """A model folder without its weights: its family and its recipe (empty for a plain diffusers pipeline)."""

    source: str
    adapter: DistillAdapter[Any]
    recipe: Mapping[str, Any]

    @property
    def is_student(self) -> bool:
        """True for a distilled model: its recipe holds a ladder."""
        return "ladder" in self.recipe

    @property
    def is_embedded(self) -> bool:
        """True for a model of an embedded world, shipped or distilled from one."""
        folders = {str(files("fastvideo").joinpath(folder)) for folder in EMBEDDED.values()}
        return self.recipe.get("model", {}).get("path") in EMBEDDED or self.source in folders

    def sampler(
        self, steps: int | None = None, guidance: float | None = None, ladder: Sequence[float] = ()
    ) -> SamplerSpec:
        """The sampler of this model; its own steps and guidance unless given.

        ``ladder``: times to sample a student at instead of its own, trained for or not.

        Raises:
            UserError: for steps below 1 or that a student was not trained for; for an unknown sampler; for an invalid
                ladder, one beside steps, or one of a teacher.
        """
        if ladder and steps is not None:
            raise UserError("a ladder says how many steps there are: give --ladder or --steps, not both")
        if ladder and not self.is_student:
            raise UserError(f"--ladder is for students; {self.source} is none: give --steps")
        if steps is not None and steps < 1:
            raise UserError(f"--steps must be at least 1, got {steps}")
        return replace(self._sampler(steps, guidance, ladder), **streaming_of(self.recipe))

    def _sampler(self, steps: int | None, guidance: float | None, ladder: Sequence[float]) -> SamplerSpec:
        default = self.recipe.get("guidance", 1.0 if self.is_student else self.adapter.folder.published_guidance)
        wanted = _guidance(default if guidance is None else guidance)
        of_folder(self.adapter.folder).check_guidance(wanted)
        if not self.is_student:
            count = steps or _steps(self.recipe.get("sampling_steps", TEACHER_STEPS))
            return SamplerSpec.teacher(self.adapter.folder.teacher_times(count), wanted)
        own, kind = Ladder(tuple(ladder or self.recipe["ladder"])), student_sampler(self.recipe)
        if kind == "flow_map" and steps not in (None, 1, len(own)):
            return SamplerSpec.student(uniform_ladder(steps), wanted, kind)  # it jumps between any two times
        return SamplerSpec.student(first_steps(own, steps or len(own)), wanted, kind)


def first_steps(ladder: Ladder, count: int) -> Ladder:
    """Ladder of ``count`` calls, which must be 1 (the first time) or all, as trained; else UserError."""
    if count in (1, len(ladder)):
        return Ladder(ladder.times[:count])
    own = "--steps 1" if len(ladder) == 1 else f"--steps {len(ladder)} or --steps 1"
    raise UserError(
        f"this student was trained for the ladder {list(ladder.times)}: it runs with {own}, not {count}; name other "
        f"times yourself: --ladder 1.0 0.5"
    )


@dataclass(frozen=True)
class LoadedModel(OpenedModel):
    """A model folder with its network."""

    network: nn.Module

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.adapter, self.network)


def open_model(
    folder: str, options: Mapping[str, Any] | None = None, device: str = "cpu", *, sized: bool = True
) -> OpenedModel:
    """Read ``folder`` (a path, a hub id or ``tiny``) but for the weights of its parts.

    Args:
        options: fields of the family's config that override the recipe's.
        sized: the size of its videos has to be known; false for those who need the network alone.

    Raises:
        UserError: if the folder is not a diffusers pipeline of a known family, its recipe is not readable, a size is
            in neither recipe nor options, an option is wrong, or the device is not here.
    """
    check_device(device)
    source, name = find_model(folder)
    recipe, family = read_recipe(source), load_adapter(name)
    written = {key: value for key, value in recipe.get("model", {}).items() if key not in OF_THE_MACHINE}
    fields = {**written, **(options or {}), "path": source}
    if sized:
        check_sizes(folder, fields, family.Config)
    config = validate(family.Config, fields, f"of the model in {folder!r}")
    adapter = family(config, device)
    return OpenedModel(source, adapter, recipe)


def load_model(
    folder: str,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    *,
    sized: bool = True,
    exact: bool = False,
) -> LoadedModel:
    """Load the network in ``folder``; text encoder and VAE follow on first use.

    Args:
        exact: as for :func:`with_network`.

    Raises:
        UserError: as :func:`open_model`.
    """
    return with_network(open_model(folder, options, device, sized=sized), exact=exact)


def unloaded(model: OpenedModel) -> OpenedModel:
    """The same model without text encoder and VAE, which ``model`` may have loaded and keeps."""
    adapter = model.adapter
    return OpenedModel(model.source, type(adapter)(adapter.config, adapter.device), model.recipe)


def with_network(model: OpenedModel, *, exact: bool = False) -> LoadedModel:
    """Load the network of an opened model, in the dtype that it is computed in.

    Args:
        exact: hold float32 weights, to be written or replaced, whatever the model computes in.
    """
    folder, scaling = model.adapter.folder, model.adapter.scaling
    direct = scaling is not None and not exact
    network = folder.load_network(dtype=folder.compute_dtype if direct else torch.float32).requires_grad_(False)
    if scaling is not None and direct:
        scaling.compute_directly(network)
    return LoadedModel(model.source, model.adapter, model.recipe, network)


def load_recipe(folder: str) -> dict[str, Any]:
    """The ``recipe.json`` of a model folder; empty for a plain pipeline.

    Raises:
        UserError: if the folder is not a pipeline of a known family or the recipe is not readable.
    """
    return read_recipe(find_model(folder)[0])


def student_sampler(recipe: Mapping[str, Any]) -> SamplerKind:
    """The sampler in a student's recipe; re-noising by default.

    Raises:
        UserError: if there is no such sampler.
    """
    kind = recipe.get("sampler", "renoise")
    if kind not in get_args(SamplerKind):
        raise UserError(f"{RECIPE}: unknown sampler {kind!r}, one of {', '.join(get_args(SamplerKind))} is expected")
    return cast(SamplerKind, kind)
