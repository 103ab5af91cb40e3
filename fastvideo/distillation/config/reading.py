"""YAML in, a validated config out; an error names the key's full path and the nearest right key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastvideo.distillation.config.overrides import NOT_YAML, as_section, with_overrides
from fastvideo.distillation.config.recipes import find_config, with_own_files
from fastvideo.distillation.config.schema import RunConfig
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.registry import load_adapter, run_schema
from fastvideo.errors import UserError
from fastvideo.texts import read_text
from fastvideo.wording import did_you_mean, nearest

ConfigT = TypeVar("ConfigT", bound=BaseModel)
NAMES = ("distill_model", "distill_method")
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names of a key that a section, or a value that is a dataclass, does not have."""


def read_config(path: str | Path, overrides: Mapping[str, Sequence[str]] | None = None) -> RunConfig[Any, Any]:
    """Read and validate the config of a run.

    Args:
        path: a YAML file, or the name of a recipe of the package.
        overrides: words by dotted key, as :func:`overrides.read_flags` returns them.

    Raises:
        UserError: for an unreadable file, an unknown name, key or flag, or an invalid value.
    """
    file = find_config(path)
    return config_of(with_own_files(read_yaml(file), file), str(file), overrides)


def config_of(
    values: Mapping[str, Any], source: str, overrides: Mapping[str, Sequence[str]] | None = None
) -> RunConfig[Any, Any]:
    """Validate the values of a YAML file, which messages call ``source``; UserError as :func:`read_config`."""
    given = dict(overrides or {})
    named = {**values, **{key: " ".join(given.pop(key)) for key in NAMES if key in given}}
    for key in NAMES:
        if not isinstance(named.get(key), str):
            raise UserError(f"config {source}: {key} is missing; give it there or as --{key.replace('_', '-')}")
    try:
        schema = run_schema(named["distill_model"], named["distill_method"])
    except UserError as error:
        raise UserError(f"config {source}: distill_model, distill_method: {error}") from error
    config = validate(schema, with_overrides(schema, named, given), source)
    for role in config.roles:
        try:
            family_of(config, role)
        except UserError as error:
            raise UserError(f"config {source}:\n  {error}") from error
    return config


SIZES = ("height", "width", "num_frames")
"""Fields that a role's own model section inherits from the run's, unless its family has sizes of its own."""


def family_of(config: RunConfig[Any, Any], role: str) -> tuple[str, AdapterConfig]:
    """Name and options of a role's family, from its own section or the run's.

    Raises:
        UserError: for an unknown family or invalid options.
    """
    section = config.roles[role].model
    if section is None:
        return config.distill_model, config.model
    if role == "student":
        raise UserError("roles.student.model: the student's family is the run's; set distill_model and model")
    values = dict(section)
    name = values.pop("family", config.distill_model)
    if not isinstance(name, str):
        raise UserError(f"roles.{role}.model.family: the name of a model family is expected, such as wan, got {name!r}")
    try:
        schema: type[AdapterConfig] = load_adapter(name).Config
    except UserError as error:
        raise UserError(f"roles.{role}.model.family: {error}") from error
    known = ("family", *schema.model_fields)
    for key in set(values) - set(known):
        raise UserError(f"roles.{role}.model.{key}: unknown key{did_you_mean(key, known)}")
    shared = (set(SIZES) & schema.model_fields.keys()) - schema.own_sizes
    sizes = {key: value for key, value in config.model if key in shared}
    try:
        return name, schema.model_validate(sizes | values)
    except ValidationError as error:
        told = (explain(schema, dict(problem)) for problem in error.errors())
        lines = [f"roles.{role}.model.{line}".replace(".(top level)", "") for line in told]
        raise UserError("\n  ".join(lines)) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping in a YAML file.

    Raises:
        UserError: if the file is missing, not YAML, or holds something else.
    """
    text = read_text(Path(path), f"config {path}")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _check_keys(path, root)
        content = None if root is None else loader.construct_document(root)
    except NOT_YAML as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path}: a mapping of keys is expected, found {type(content).__name__}")
    return content


def _check_keys(path: str | Path, root: yaml.Node | None) -> None:
    """Refuse a key that a mapping holds twice, of which YAML keeps the last."""
    left, seen = [("", root)], set[int]()
    while left:
        where, node = left.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += [(f"{where}{number}.", item) for number, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            left += [(f"{where}{key.value}.", value) for key, value in node.value]
            _check_once(path, where, [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])


def _check_once(path: str | Path, where: str, keys: Sequence[yaml.ScalarNode]) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if key.value in lines:
            both = f"in line {lines[key.value]} and in line {line}"
            raise UserError(f"config {path}: {where}{key.value} is there twice, {both}; only the last would count")
        lines[key.value] = line


def validate(schema: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """Validate ``values``.

    Raises:
        UserError: one line per problem, with the key's full path and, for an unknown key, the nearest one.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [explain(schema, dict(problem)) for problem in error.errors()]
        raise UserError("\n  ".join([f"config {source}:", *lines])) from error


def explain(schema: type[BaseModel], problem: dict[str, Any]) -> str:
    """One line about a problem of pydantic: the key's full path and the error."""
    path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] not in UNKNOWN_KEY:
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if problem["type"] not in ("missing", "value_error") else ""
        return f"{path}: {message}{given}"
    known = _fields_at(schema, problem["loc"][:-1])
    near = nearest(str(problem["loc"][-1]), known)
    hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _fields_at(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that are allowed at a location of the config."""
    current: Any = schema
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        else:  # mapping of sections, such as roles
            current = current.__args__[1]
        options = [one for one in get_args(current) if one is not type(None)]
        if isinstance(current, UnionType) and len(options) == 1:  # optional section
            current = options[0]
    return list(as_section(current).model_fields)
