"""A model by its path: its family, its recipe, and the sizes that its weights do not hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastvideo.distillation.adapters.diffusers.folder import read_recipe
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED, read_index
from fastvideo.distillation.adapters.diffusers.sources import fetched, resolve_pipeline
from fastvideo.distillation.builder import Adapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.registry import families, load_adapter
from fastvideo.distillation.types import UserError

SIZES = ("height", "width", "num_frames", "max_sequence_length")
"""Fields of a family's config that every model but an embedded one must name."""


@dataclass(frozen=True)
class ModelChoice:
    """A family and the fields of its config; picklable, for other processes."""

    family: str
    fields: Mapping[str, Any]

    def sized(self, height: int, width: int, num_frames: int) -> ModelChoice:
        """The same model at another size.

        Raises:
            UserError: if the family cannot take that size.
        """
        fields = {**self.fields, "height": height, "width": width, "num_frames": num_frames}
        validate(load_adapter(self.family).Config, fields, f"of size {height}x{width}x{num_frames}")
        return replace(self, fields=fields)

    def adapter(self, device: str) -> Adapter:
        """The family's adapter; encoder and VAE are loaded on first use.

        Raises:
            UserError: for a config that is not valid.
        """
        cls = load_adapter(self.family)
        return cls(validate(cls.Config, self.fields, f"of the model {self.fields['path']!r}"), device)


def choose_model(path: str, given: Mapping[str, int | None]) -> ModelChoice:
    """The model at ``path`` (a folder, a hub id or ``tiny``) with the sizes of :data:`SIZES`.

    A size is the given one, else that of the model's ``recipe.json``, else the default of its diffusers pipeline.

    Raises:
        UserError: if there is no such model, or a size is unknown.
    """
    source, family = find_model(path)
    pipeline = pipeline_class(source)
    named = {name: value for name, value in given.items() if value is not None}
    known = {**_pipeline_sizes(path, pipeline), **read_recipe(source).get("model", {}), **named}
    config = load_adapter(family).Config
    fields = {name: value for name, value in known.items() if name in config.model_fields}
    check_sizes(path, fields, config)
    if "prompt_cache_mib" in config.model_fields:  # every caption is encoded once
        fields["prompt_cache_mib"] = 0
    return ModelChoice(family, validate(config, {**fields, "path": path}, f"of the model {path!r}").model_dump())


def find_model(path: str) -> tuple[str, str]:
    """The pipeline folder behind a path, and its family: a class of your own that its recipe names, or its pipeline's.

    Raises:
        UserError: as :func:`resolve_pipeline`, or for a class that cannot be imported.
    """
    named = str(read_recipe(str(fetched(path))).get("distill_model"))
    if ":" in named:
        load_adapter(named)  # its pipelines are known now
    source = resolve_pipeline(path, tuple(families()))
    return source, named if ":" in named else families()[pipeline_class(source)]


def pipeline_class(source: str) -> str:
    """``_class_name`` of a pipeline folder that :func:`resolve_pipeline` has checked."""
    return str(read_index(source)["_class_name"])


def check_sizes(path: str, fields: Mapping[str, Any], config: type[AdapterConfig]) -> None:
    """Refuse a model without sizes: the config's defaults are mostly those of the embedded model alone.

    Raises:
        UserError: with the flags of the missing sizes.
    """
    missing = [name for name in SIZES if name in config.model_fields and name not in config.own_sizes | fields.keys()]
    if missing and path not in EMBEDDED:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(
            f'model {path!r} does not say which size it is made for: give {flags} (or write a "model" section with '
            f"{', '.join(missing)} into its recipe.json)"
        )


def _pipeline_sizes(path: str, pipeline: str) -> dict[str, int]:
    """Default sizes of a published diffusers pipeline."""
    if path in EMBEDDED:
        return {}
    import diffusers

    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    defaults = {name: parameters[name].default for name in SIZES if name in parameters}
    return {name: value for name, value in defaults.items() if isinstance(value, int)}
