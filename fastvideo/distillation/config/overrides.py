"""Overrides of a config file: flags to dotted keys, and their words to field values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import create_model

from fastvideo.distillation.config.base import Section
from fastvideo.errors import UserError
from fastvideo.wording import nearest

NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""Errors of PyYAML; for a scalar that is not what it looks like, such as 2026-02-30, it lets Python's own through."""
EMPTY = ("None", "none", "null")
FIELDS_HELP = "`fastvideo distill --config FILE --help` lists all"
Overrides = Mapping[str, Sequence[str]]
"""Words for each dotted key, such as ``{"trainer.max_steps": ["100"]}``."""


def read_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Parse flags such as ``--trainer.max-steps 100``; ``--init-ROLE-from`` sets the role's ``init_from``.

    Raises:
        UserError: for a word without a flag.
    """
    given: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = re.sub(r"^init_(\w+)_from$", r"roles.\1.init_from", name.replace("-", "_"))
            given[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"{word!r}: a flag such as --trainer.max-steps 100 is expected")
        else:
            given[key].append(word)
    return given


def flag(key: str) -> str:
    """Dotted key as a flag."""
    return f"--{key.replace('_', '-')}"


def with_overrides(schema: type[Section], values: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Copy of a file's values with the overrides applied; the schema validates them later.

    Raises:
        UserError: for an unknown key, with the nearest one, or a missing value.
    """
    result = dict(values)
    roles = values.get("roles")
    names = [str(name) for name in roles] if isinstance(roles, Mapping) else []
    for key, words in overrides.items():
        key, words = _switched_off(schema, key, words)
        kind = annotation_at(schema, key.split("."))
        _check_key(schema, key, kind, names)
        _put(schema, result, key.split("."), _value(key, kind, words))
    return result


def annotation_at(schema: type[Section], keys: Sequence[str]) -> Any:
    """Type of a field by its path, with a role's name after ``roles``; ``None`` for an unknown field."""
    field, rest = schema.model_fields.get(keys[0]), keys[1:]
    kind = schema.written_as.get(keys[0]) if field is None else field.annotation
    if not rest:
        return kind
    inner = section_in(kind)
    if inner is None and dict in kinds(kind):  # an open mapping, whose keys are checked with its values
        return object if len(rest) == 1 else None
    rest = rest[1:] if get_origin(kind) is dict else rest
    return annotation_at(inner, rest) if inner and rest else None


def section_in(kind: Any) -> type[Section] | None:
    """Section in a field's type, be it alone, optional or in a mapping."""
    found = (one for one in kinds(kind) if isinstance(one, type))
    return next((as_section(one) for one in found if issubclass(one, Section) or is_dataclass(one)), None)


@cache
def as_section(kind: type[Any]) -> type[Section]:
    """A section, or the fields of a value (a dataclass) as one."""
    if issubclass(kind, Section):
        return kind
    types = get_type_hints(kind)
    options = {field.name: (types[field.name], field.default) for field in fields(kind)}
    return create_model(kind.__name__, __base__=Section, **options)  # type: ignore[call-overload, no-any-return]


def kinds(annotation: Any) -> Iterator[Any]:
    """Types that an annotation contains."""
    yield get_origin(annotation) or annotation
    for inner in get_args(annotation):
        yield from kinds(inner)


def _switched_off(schema: type[Section], key: str, words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """``data.no_buckets`` is ``data.buckets false``."""
    positive = re.sub(r"(^|\.)no_(\w+)$", r"\1\2", key)
    off = positive != key and not words and annotation_at(schema, positive.split(".")) is bool
    return (positive, ["false"]) if off else (key, words)


def _check_key(schema: type[Section], key: str, kind: Any, roles: Sequence[str]) -> None:
    parts = key.split(".")
    if parts[0] == "roles" and len(parts) > 1 and parts[1] not in roles:
        raise UserError(f"{flag(key)}: the config has no role {parts[1]!r}; it has {', '.join(roles)}")
    if kind is None or (section_in(kind) and parts[-1] != "lora"):
        near = _nearest_key(key, list(_keys(schema, roles)))
        raise UserError(f"{flag(key)}: unknown flag; {f'did you mean {flag(near)!r}?' if near else FIELDS_HELP}")


def _nearest_key(key: str, known: Sequence[str]) -> str | None:
    """Nearest key of the same section, else of all, else one with a near last part."""
    section, _, name = key.rpartition(".")
    beside = [one for one in known if one.rpartition(".")[0] == section]
    names = {one.rpartition(".")[2]: one for one in known}
    last = nearest(name, names)
    return nearest(key, beside) or nearest(key, known) or (names[last] if last else None)


def _keys(schema: type[Section], roles: Sequence[str], before: str = "") -> Iterator[str]:
    """Dotted keys of all flags."""
    for name, field in schema.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None:
            yield f"{before}{name}"
        elif get_origin(field.annotation) is dict:
            for role in roles:
                yield from _keys(inner, (), f"{before}{name}.{role}.")
        else:
            yield from _keys(inner, (), f"{before}{name}.")
    yield from (f"{before}{name}" for name in schema.written_as)


def _put(schema: type[Section], values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a value in copies of its sections; validation reports a section of another type."""
    for key in keys[:-1]:
        section = values.get(key)
        if section is not None and not isinstance(section, Mapping):
            return
        values[key] = dict(section or {})
        values = values[key]
    holder = section_in(annotation_at(schema, keys[:-1])) if len(keys) > 1 else schema
    for rival in holder.rivals(keys[-1]) if holder else ():
        values.pop(rival, None)
    values[keys[-1]] = value


def _value(key: str, kind: Any, words: Sequence[str]) -> Any:
    found, union = set(kinds(kind)), get_origin(kind) in (Union, UnionType)
    options = [one for one in get_args(kind) if one is not type(None)] if union else [kind]
    if all(tuple in kinds(one) for one in options):  # guidance, a number or a list, is one word of YAML
        return [_word(found, word) for word in words]
    if not words:
        if bool in found:
            return True
        raise UserError(f"{flag(key)}: a value is expected")
    optional = union and type(None) in get_args(kind)
    if optional and words[0] in EMPTY:
        return None
    return _word(found, words[0]) if len(words) == 1 else list(words)


def _word(found: set[Any], word: str) -> Any:
    """Word of a text field as it is, otherwise parsed as YAML."""
    if str in found or Literal in found:
        return word
    try:
        return yaml.safe_load(word)
    except NOT_YAML:
        return word
