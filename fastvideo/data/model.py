"""The model that videos are encoded for: its family, and the size it takes where nobody says one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.distillation.adapters.diffusers.folder import read_recipe
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED, resolve_pipeline
from fastvideo.distillation.builder import Adapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import families, load_adapter
from fastvideo.distillation.types import UserError

SIZES = ("height", "width", "num_frames", "max_sequence_length")
"""What a family's config must be told about any model but an embedded one."""


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
        return ModelChoice(self.family, fields)

    def adapter(self, device: str) -> Adapter:
        """The family's adapter; what it needs of the model is loaded on first use.

        Raises:
            UserError: for a config that is not valid.
        """
        cls = load_adapter(self.family)
        return cls(validate(cls.Config, self.fields, f"of the model {self.fields['path']!r}"), device)


def choose_model(path: str, given: Mapping[str, int | None]) -> ModelChoice:
    """The model at ``path`` (a folder, a hub id or ``tiny``) with the sizes of :data:`SIZES`.

    A size is what is given, else what the model's ``recipe.json`` says, else what its diffusers pipeline generates when
    it is not told a size.

    Raises:
        UserError: if there is no such model, or nothing says its size.
    """
    source = resolve_pipeline(path, tuple(families()))
    pipeline = str(json.loads((Path(source) / "model_index.json").read_text())["_class_name"])
    family = families()[pipeline]
    named = {name: value for name, value in given.items() if value is not None}
    known = {**_pipeline_sizes(path, pipeline), **read_recipe(source).get("model", {}), **named}
    config = load_adapter(family).Config
    fields = {name: value for name, value in known.items() if name in config.model_fields}
    missing = [name for name in SIZES if name in config.model_fields and name not in fields]
    if missing and path not in EMBEDDED:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"model {path!r} does not say which size it is made for: give {flags}")
    if "prompt_cache_mib" in config.model_fields:  # every caption is encoded once
        fields["prompt_cache_mib"] = 0
    return ModelChoice(family, validate(config, {**fields, "path": path}, f"of the model {path!r}").model_dump())


def _pipeline_sizes(path: str, pipeline: str) -> dict[str, int]:
    """The sizes that a published pipeline generates by default, as diffusers says."""
    if path in EMBEDDED:
        return {}
    import diffusers

    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    defaults = {name: parameters[name].default for name in SIZES if name in parameters}
    return {name: value for name, value in defaults.items() if isinstance(value, int)}
