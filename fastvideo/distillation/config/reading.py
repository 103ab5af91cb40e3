"""YAML in, a validated config out; an error names the key's full path and the nearest right key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastvideo.errors import UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: if it is not there, not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path}: a mapping of keys is expected, found {type(content).__name__}")
    return content


def validate(schema: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """``values`` as a config.

    Raises:
        UserError: one line per problem, with the key's full path and, for an unknown key, the nearest right one.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [explain(schema, dict(problem)) for problem in error.errors()]
        raise UserError("\n  ".join([f"config {source}:", *lines])) from error


def explain(schema: type[BaseModel], problem: dict[str, Any]) -> str:
    """One line about a problem that pydantic found: the key's full path, and what is wrong there."""
    path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if problem["type"] not in ("missing", "value_error") else ""
        return f"{path}: {message}{given}"
    known = _fields_at(schema, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _fields_at(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed at a location of the config."""
    current: Any = schema
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        else:  # a mapping of sections, such as roles
            current = current.__args__[1]
        options = [one for one in get_args(current) if one is not type(None)]
        if isinstance(current, UnionType) and len(options) == 1:  # a section that may be left out
            current = options[0]
    return list(current.model_fields)
