"""Sampler of a model that generates chunk by chunk, as its ``recipe.json`` has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastvideo.distillation.chunks import STREAMING, Reach
from fastvideo.distillation.config.base import Time
from fastvideo.distillation.rollout import Ladder
from fastvideo.errors import UserError

_REACH = [field.name for field in fields(Reach)]


def streaming_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sampler that a stream adds; empty for a model that makes whole videos at once.

    Raises:
        UserError: if the recipe's values are none.
    """
    if STREAMING not in recipe:
        return {}
    given = recipe[STREAMING]
    try:
        values = TypeAdapter(dict[str, Any]).validate_python(given, strict=True)
        reach = TypeAdapter(Reach).validate_python({name: values[name] for name in _REACH if name in values})
        context_time = TypeAdapter(Time).validate_python(values.get("context_time", 0.0))
        first = TypeAdapter(tuple[Time, ...]).validate_python(values.get("first_ladder", ()))
        return {"reach": reach, "context_time": context_time, "first_times": first and Ladder(first).times}
    except (ValidationError, UserError) as error:
        raise UserError(f"recipe.json: {STREAMING} {given!r} is not what a stream needs: {error}") from error
